"""The public data that tasks are cut from: found by KVFOLD_DATA, never part of the package."""

import json
import os
from pathlib import Path
from typing import Any

from kvfold.calibration.text import read_text
from kvfold.errors import PromptError
from kvfold.evaluation.errors import EvaluationError

VARIABLE = "KVFOLD_DATA"
DEFAULT = Path("../shared/data")
WIKITEXT = "wikitext2/wiki.test.raw"
LINES = "longeval/200_lines.jsonl"
XQUAD = "squad/xquad.en.json"
HELD_OUT = 0.6
"""Where the part of WikiText begins that nothing is calibrated on."""


def data_path(name: str) -> Path:
    """Where the file `name` of the data folder is. Raises EvaluationError where it is missing."""
    folder = Path(os.environ.get(VARIABLE) or DEFAULT)
    path = folder / name
    if not os.path.isfile(path):
        raise EvaluationError(f"there is no {name} in the data folder {folder}; set {VARIABLE} to a folder that has it")
    return path


def read_wikitext() -> str:
    """The last 40 % of WikiText-2's raw test split."""
    content = _text(data_path(WIKITEXT))
    return content[round(HELD_OUT * len(content)) :]


def read_objects(name: str) -> list[dict[str, Any]]:
    """The objects of a JSONL file, one a line."""
    path = data_path(name)
    return [_object(path, line) for line in _text(path).splitlines() if line.strip()]


def read_object(name: str) -> dict[str, Any]:
    """The object that a JSON file is."""
    path = data_path(name)
    return _object(path, _text(path))


def damaged(name: str) -> EvaluationError:
    """The error for a file whose content is not what its name says."""
    return EvaluationError(f"{name} in the data folder is damaged; copy it again")


def _text(path: Path) -> str:
    try:
        return read_text(path).content
    except PromptError as error:
        raise EvaluationError(str(error)) from error


def _object(path: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise EvaluationError(f"{path} is damaged (no JSON object where one should be); copy it again")
    return value
