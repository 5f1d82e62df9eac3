"""`zeroc(max_loss=...)`: the fewest bits whose measured loss on held-out text stays within the limit."""

import contextlib
import json
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from kvfold.calibration.artifact import Artifact
from kvfold.config.engine import EngineConfig
from kvfold.config.files import write_atomically
from kvfold.config.progress import SILENT, Progress
from kvfold.engine.engine import Engine
from kvfold.engine.lane import build_lane, cache_shape
from kvfold.engine.scoring import score
from kvfold.errors import CalibrationError
from kvfold.methods.dense import Dense
from kvfold.methods.method import Method
from kvfold.methods.zeroc import ZeroC
from kvfold.model.loading import LoadedModel

LOWEST, HIGHEST, STEP = 1.0, 8.0, 0.125


@dataclass(frozen=True)
class Trial:
    """`bits` per element raised the perplexity of held-out text by the fraction `loss`."""

    bits: float
    loss: float


def search_bits(
    model: LoadedModel, codec: ZeroC, artifact: Artifact, path: Path, raw_bits: int, progress: Progress = SILENT
) -> tuple[ZeroC, list[Trial]]:
    """The codec with `bits` in place of `max_loss`, and the curve that was measured, most bits first.

    Bisects on a grid of 1/8 bit. What was measured is kept beside the artifact at `path` for the next time.
    Raises CalibrationError where not even 8 bits meet the limit.
    """
    assert codec.max_loss is not None
    # A request generates a token after its prompt, so a window as long as the model's positions is one too long.
    windows = [window[: model.spec.max_positions - 1].tolist() for window in artifact.tensors["held_out"]]
    dense_bytes = cache_shape(model.spec, raw_bits).dense_bytes(len(windows[0]) + 64) * raw_bits // 16
    config = EngineConfig(kv_memory=2 * len(windows) * dense_bytes, prefix_caching=False)
    key = _key(codec, artifact)
    known = _read(path, key)

    def perplexity(codec: ZeroC | Dense, what: str) -> float:
        lane = build_lane(model.decoder, what, Method(codec), raw_bits, artifact.tensors)
        engine = Engine(model.decoder, model.tokenizer, [lane], config)
        return score(engine, windows, what=f"measuring {what}", progress=progress).perplexity

    @cache  # not measured at all where the whole curve is known
    def dense() -> float:
        return perplexity(Dense(), "none")

    def loss(bits: float) -> float:
        if bits not in known:
            trial = replace(codec, bits=bits, max_loss=None)
            known[bits] = perplexity(trial, f"zeroc(bits={bits:g})") / dense() - 1
        return known[bits]

    low, high = round(LOWEST / STEP) - 1, round(HIGHEST / STEP)  # low fails (or is off the grid), high holds
    if loss(high * STEP) > codec.max_loss:
        raise CalibrationError(
            f"max_loss={codec.max_loss:g} is not met even at {HIGHEST:g} bits ({known[HIGHEST]:+.2%}); allow more loss"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if loss(middle * STEP) <= codec.max_loss else (middle, high)
    _write(path, key, known)
    curve = [Trial(bits, known[bits]) for bits in sorted(known, reverse=True)]
    return replace(codec, bits=high * STEP, max_loss=None), curve


def _key(codec: ZeroC, artifact: Artifact) -> str:
    """What a curve holds for; the header tells a calibration from an earlier one at the same place."""
    return f"{codec.map} {codec.sinks} {codec.recent} {json.dumps(asdict(artifact.header))}"


def _read(path: Path, key: str) -> dict[float, float]:
    try:
        return {float(trial["bits"]): float(trial["loss"]) for trial in _curves(path)[key]}
    except (KeyError, TypeError, ValueError):
        return {}  # measured again


def _write(path: Path, key: str, known: dict[float, float]) -> None:
    curves = _curves(path) | {key: [asdict(Trial(bits, loss)) for bits, loss in sorted(known.items())]}
    # The result stands whether or not it can be kept: an artifact may lie in a folder of somebody else's.
    with contextlib.suppress(OSError):
        write_atomically(path.with_suffix(".json"), json.dumps(curves, indent=1).encode())


def _curves(path: Path) -> dict[str, Any]:
    """What earlier searches measured with the artifact at `path`, by settings; nothing where it cannot be read."""
    try:
        found = json.loads(path.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
