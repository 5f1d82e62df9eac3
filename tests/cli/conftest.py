"""Running `kvfold` the way a user does."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvfold.cli.app import main

Kvfold = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A cache of its own, no network, and a wide terminal."""
    cache = tmp_path_factory.mktemp("cache")
    return {"KVFOLD_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


@pytest.fixture(scope="session")
def kvfold(environment: dict[str, str]) -> Kvfold:
    """`kvfold(*arguments)` runs the installed command in a process of its own."""
    command = Path(sys.executable).with_name("kvfold")

    def run(*arguments: str | Path, stdin: str = "") -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [command, *map(str, arguments)],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, **environment},
        )

    return run


@pytest.fixture(scope="session")
def kvfold_here(environment: dict[str, str]) -> Kvfold:
    """Like `kvfold`, but calls the command's entry point in this process: importing torch takes seconds."""

    def run(*arguments: str | Path, stdin: str = "") -> "subprocess.CompletedProcess[str]":
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8"))
            code = main([str(argument) for argument in arguments])
        stdout, stderr = (stream.buffer.getvalue().decode() for stream in (out, err))  # type: ignore[attr-defined]
        return subprocess.CompletedProcess(arguments, code, stdout, stderr)

    return run
