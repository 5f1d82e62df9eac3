"""The whole of calibration: text to artifact, or the artifact that is there already."""

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from kvfold.calibration.artifact import (
    FORMAT_VERSION,
    SUFFIX,
    Artifact,
    Header,
    check_folder,
    load_artifact,
    save_artifact,
)
from kvfold.calibration.capture import Capture
from kvfold.calibration.statistics import zeroc_statistics
from kvfold.calibration.text import Text, default_text, read_text
from kvfold.config.progress import SILENT, Progress
from kvfold.errors import CalibrationError, ConfigError
from kvfold.model.cache import cache_folder
from kvfold.model.loading import LoadedModel, load_model

DEFAULT_TOKENS = 12288
DEFAULT_CONTEXT = 8192  # positions to spread the sequences over, if the model has as many
WINDOW = 2048  # tokens per sequence
MIN_TOKENS = 1024
HELD_OUT = 0.2  # the end of the text, for choosing bits by measured loss
HELD_OUT_WINDOWS = 4
SAMPLES = 2048  # rows per head that quantisers are fitted to


@dataclass(frozen=True)
class CalibrationResult:
    """Where the artifact is and what it was made from; `perplexity` is the dense model's on the text."""

    path: Path
    text: str
    tokens: int
    context: int
    perplexity: float
    seconds: float


def calibrate(
    model: str | Path,
    *,
    text: Path | None = None,
    start: float = 0.0,
    stop: float = 1.0,
    tokens: int | None = None,
    context: int | None = None,
    out: Path | None = None,
    progress: Progress = SILENT,
) -> CalibrationResult:
    """Calibrates a model on a text file (None: the embedded default) and saves the artifact.

    tokens: how many to use; context: positions to calibrate for; out: directory (None: the user's cache).
    Raises CalibrationError for a text that is too short or a file that cannot be written.
    """
    folder = _cache() if out is None else out
    check_folder(folder)
    source = (default_text() if text is None else read_text(text)).part(start, stop)
    loaded = load_model(model, dtype=torch.float32, progress=progress)
    artifact = calibrate_model(loaded, source, (start, stop), tokens=tokens, context=context, progress=progress)
    path = default_path(loaded, source, tokens, context) if out is None else folder / f"zeroc{SUFFIX}"
    save_artifact(path, artifact)
    header = artifact.header
    return CalibrationResult(path, source.name, header.tokens, header.context, header.perplexity, header.seconds)


def calibrate_model(
    model: LoadedModel,
    text: Text,
    part: tuple[float, float] = (0.0, 1.0),
    *,
    tokens: int | None = None,
    context: int | None = None,
    progress: Progress = SILENT,
) -> Artifact:
    """Measures a float32 model on `text`, which is the given part of what the header will name."""
    began = time.monotonic()
    _check(tokens, context)
    ids = torch.tensor(model.tokenizer(text.content, verbose=False)["input_ids"])
    context = min(context or DEFAULT_CONTEXT, model.spec.max_positions)
    windows, held_out = _windows(ids, tokens or DEFAULT_TOKENS, min(context, WINDOW))
    last = context - len(windows[0]) if model.spec.rope else 0
    capture = Capture(model.decoder, SAMPLES, len(windows))
    losses = []
    with progress.task("calibrating", len(windows) + 1) as advance:
        for i, window in enumerate(windows):
            # Denser towards the start: every request passes there, few go far.
            losses.append(capture.run(window, round(last * (i / max(len(windows) - 1, 1)) ** 2)))
            advance()
        tensors = zeroc_statistics(model.decoder, capture)
        advance()
    header = Header(
        model=model.fingerprint,
        text=text.digest,
        start=part[0],
        stop=part[1],
        tokens=sum(map(len, windows)),
        context=context,
        seconds=round(time.monotonic() - began, 3),
        perplexity=float(torch.tensor(losses).mean().exp()),
    )
    return Artifact(header, {**tensors, "held_out": held_out})


def find_artifact(model: LoadedModel, path: Path | None, progress: Progress = SILENT) -> tuple[Path, Artifact]:
    """The artifact at `path` (a file, or a directory with one), or the default one, made now if it is not there.

    Making it needs `model` in float32; another dtype is loaded anew for the purpose.
    """
    if path is not None:
        path = _in_directory(path)
        return path, load_artifact(path, model.fingerprint)
    text = default_text()
    path = default_path(model, text, None, None)
    if not os.path.isfile(path):
        check_folder(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):  # workers that start together need it made once
            if not os.path.isfile(path):
                full = model if model.decoder.dtype == torch.float32 else load_model(model.path, dtype=torch.float32)
                save_artifact(path, calibrate_model(full, text, progress=progress))
    return path, load_artifact(path, model.fingerprint)


def default_path(model: LoadedModel, text: Text, tokens: int | None, context: int | None) -> Path:
    """Where the user's cache keeps the artifact of a model, text and settings."""
    settings = (FORMAT_VERSION, model.fingerprint, text.digest, tokens or DEFAULT_TOKENS, context or DEFAULT_CONTEXT)
    return _cache() / f"{hashlib.sha256(repr(settings).encode()).hexdigest()[:24]}{SUFFIX}"


def _cache() -> Path:
    return cache_folder() / "calibration"


def _check(tokens: int | None, context: int | None) -> None:
    if tokens is not None and tokens < MIN_TOKENS:
        raise ConfigError(f"--tokens {tokens} is too few to calibrate on; give at least {MIN_TOKENS}")
    if context is not None and context < 256:
        raise ConfigError(f"--context {context} is too short to have far tokens; give at least 256")


def _windows(ids: Tensor, tokens: int, size: int) -> tuple[list[Tensor], Tensor]:
    """Sequences of up to `size` tokens spread evenly over the text, and others from its held-out end, int64."""
    if len(ids) < MIN_TOKENS / (1 - HELD_OUT):
        raise CalibrationError(
            f"the text has {len(ids)} tokens, calibration needs {round(MIN_TOKENS / (1 - HELD_OUT))}; "
            "give a longer text or leave --text out for the default one"
        )
    head, tail = ids[: round(len(ids) * (1 - HELD_OUT))], ids[round(len(ids) * (1 - HELD_OUT)) :]
    size = min(size, len(head) // 2)
    held_out = _spread(tail, min(size, len(tail)), HELD_OUT_WINDOWS)
    return _spread(head, size, max(1, round(tokens / size))), torch.stack(held_out)


def _spread(ids: Tensor, size: int, count: int) -> list[Tensor]:
    """Up to `count` windows of `size` tokens that do not overlap, at even distances."""
    count = min(count, len(ids) // size)
    gap = len(ids) // count
    return [ids[i * gap : i * gap + size] for i in range(count)]


def _in_directory(path: Path) -> Path:
    if not os.path.isdir(path):  # unlike Path's, False where the path cannot be looked up
        return path
    found = sorted(path.glob(f"*{SUFFIX}"))
    if len(found) != 1:
        what = "no calibration" if not found else f"{len(found)} calibrations"
        raise CalibrationError(f"{path} holds {what}; name the file itself")
    return found[0]
