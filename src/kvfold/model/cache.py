"""The user's cache folder, and building an entry in it once and completely."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from kvfold.errors import ModelError

_REMEDY = "free some space or set KVFOLD_CACHE to another folder"


def cache_folder() -> Path:
    """KVFOLD_CACHE if set, else the platform's cache folder for kvfold."""
    from platformdirs import user_cache_dir

    return Path(os.environ.get("KVFOLD_CACHE") or user_cache_dir("kvfold", appauthor=False))


def cached_directory(name: str, build: Callable[[Path], None]) -> Path:
    """The directory `name` of the cache, made by `build(empty directory)` if it does not exist.

    It appears whole or not at all: built beside its place and renamed. Of several processes one builds
    and the others wait. Whatever interrupts the build, Ctrl-C included, removes what was built so far.
    Raises ModelError if the cache cannot be written; errors of `build` pass through.
    """
    from filelock import FileLock

    final = cache_folder() / name
    if os.path.isdir(final):  # unlike Path's, False where the path cannot be looked up
        return final
    partial = final.with_name(f".{final.name}.partial")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(final.with_name(f".{final.name}.lock")):
            if final.is_dir():
                return final
            # Left by a process that was killed: nobody else builds while we hold the lock.
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                build(partial)
                os.replace(partial, final)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ModelError(f"the cache folder {final.parent} cannot be written ({reason}): {_REMEDY}") from error
    return final


def check_space(directory: Path, needed: int) -> None:
    """Raise OSError (ENOSPC) unless `needed` bytes are free, before some library fails half way."""
    if shutil.disk_usage(directory).free < needed:
        raise OSError(errno.ENOSPC, f"{needed >> 20} MiB are needed")
