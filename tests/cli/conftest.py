"""Running `kvfold` the way a user does."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Kvfold = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def kvfold(tmp_path_factory: pytest.TempPathFactory) -> Kvfold:
    """`kvfold(*arguments)` runs the installed command in a process of its own, with a cache of its own."""
    command = Path(sys.executable).with_name("kvfold")
    cache = tmp_path_factory.mktemp("cache")

    def run(*arguments: str | Path, stdin: str = "") -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [command, *map(str, arguments)],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "KVFOLD_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
        )

    return run
