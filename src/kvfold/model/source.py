"""From what the user calls a model to a local directory that holds it."""

import os
import re
from pathlib import Path

from kvfold.config.progress import SILENT, Progress
from kvfold.config.suggest import suggest
from kvfold.errors import ModelError
from kvfold.model.alias import ALIASES, find_alias
from kvfold.model.gguf import convert_gguf
from kvfold.model.hub import download, download_config

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+")


def resolve_model(source: str | Path, progress: Progress = SILENT) -> Path:
    """A local directory with config, safetensors and tokenizer.

    `source`, tried in this order: a directory; a GGUF file (converted once into the user's cache); an alias
    (`smollm2-135m`); a hub id `org/name` (downloaded once into the hub's cache). Raises ModelError, naming
    the remedy, for anything else and for what cannot be fetched or converted.
    """
    local = _resolve_local(source, progress)
    return download(str(source)) if local is None else local


def resolve_config(source: str | Path, progress: Progress = SILENT) -> Path:
    """Like `resolve_model`, but of a hub id only the configuration is fetched."""
    local = _resolve_local(source, progress)
    return download_config(str(source)) if local is None else local


def _resolve_local(source: str | Path, progress: Progress) -> Path | None:
    """The directory of a source that needs no network; None: the source is a hub id."""
    if not isinstance(source, str | Path):
        raise ModelError(f"{source!r} is no model: give the name of a model or the path of its directory")
    # Unlike Path's methods, those of os.path take unknown users and unreadable or overlong paths as not there.
    path = Path(os.path.expanduser(source))
    if str(source) and os.path.isdir(path):  # Path("") would be the working directory
        return path
    if path.suffix.lower() == ".gguf":
        return convert_gguf(path, progress)
    if os.path.isfile(path):
        raise ModelError(f"{path} is not a model: name the directory that holds it, or a .gguf file")
    name = str(source)
    if name.lower() in ALIASES:
        return convert_gguf(find_alias(name.lower()), progress)
    if isinstance(source, str) and _HUB_ID.fullmatch(source):
        return None
    raise ModelError(
        f"no model {name!r}: name a directory, a .gguf file, a hub id such as org/name, "
        f"or {' or '.join(ALIASES)}{suggest(name, ALIASES)}"
    )
