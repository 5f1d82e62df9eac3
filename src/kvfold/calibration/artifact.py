"""The saved calibration: one safetensors file whose header says what it was made from, and a checksum."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kvfold.config.files import write_atomically
from kvfold.errors import CalibrationError

FORMAT_VERSION = 2
SUFFIX = ".kvfold.safetensors"


@dataclass(frozen=True)
class Header:
    """What an artifact was made from. `model` and `text` are content hashes."""

    model: str
    text: str
    start: float
    stop: float
    tokens: int
    context: int
    seconds: float
    perplexity: float


@dataclass(frozen=True)
class Artifact:
    """checksum: of the file that it was read from."""

    header: Header
    tensors: Mapping[str, Tensor]
    checksum: str = ""


def checksum(header: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the header as it is written and names, dtypes, shapes and bytes of all tensors."""
    digest = hashlib.sha256(f"{header}\n".encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def save_artifact(path: Path, artifact: Artifact) -> None:
    """Writes atomically: a full disk or an interruption leaves an older file as it was.

    Raises CalibrationError where the file cannot be written.
    """
    header = json.dumps(asdict(artifact.header))
    metadata = {
        "kvfold_format": str(FORMAT_VERSION),
        "kvfold_header": header,
        "kvfold_checksum": checksum(header, artifact.tensors),
    }
    data = save(dict(artifact.tensors), metadata)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CalibrationError(f"cannot write {path}: {reason}; free some space or choose another --out") from error


def check_folder(folder: Path) -> None:
    """Raises CalibrationError where `folder` cannot be written or made, before minutes are spent on what goes there."""
    existing = folder.absolute()
    while not os.path.exists(existing):
        existing = existing.parent
    if not os.path.isdir(existing) or not os.access(existing, os.W_OK):
        raise CalibrationError(f"{folder} cannot be written; choose another --out or set KVFOLD_CACHE")


def load_artifact(path: Path, model: str | None = None) -> Artifact:
    """Reads and verifies an artifact; `model` is the fingerprint that it must have been made for (None: any).

    Raises CalibrationError for a file that is missing, damaged, of another version or of another model.
    """
    again = "run `kvfold calibrate` again"
    if not os.path.isfile(path):  # unlike Path's, False where the path cannot be looked up
        raise CalibrationError(f"there is no calibration at {path}; run `kvfold calibrate` first")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            version = metadata.get("kvfold_format")
            if version is None:
                raise CalibrationError(f"{path} is not a kvfold calibration; {again}")
            if version != str(FORMAT_VERSION):
                raise CalibrationError(f"{path} has format {version}, this kvfold reads {FORMAT_VERSION}; {again}")
            header = Header(**json.loads(metadata["kvfold_header"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CalibrationError(f"{path} is damaged and cannot be read; {again}") from error
    found = checksum(metadata["kvfold_header"], tensors)
    if metadata.get("kvfold_checksum") != found:
        raise CalibrationError(f"{path} fails its checksum; {again}")
    if model is not None and header.model != model:
        raise CalibrationError(f"{path} was made for another model; {again} for this one")
    return Artifact(header, tensors, found)
