"""Perplexity of a text through a method's cache and through the dense one, on the same path as generation."""

from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic

from kvfold.calibration.text import read_text
from kvfold.config.engine import EngineConfig
from kvfold.config.progress import SILENT, Progress
from kvfold.engine.engine import Engine
from kvfold.engine.lane import MethodLane, build_lane, pack_lanes
from kvfold.engine.llm import prepare_lane, resolve_dtypes
from kvfold.engine.scoring import Score, score
from kvfold.engine.search import Trial
from kvfold.errors import ConfigError, PromptError
from kvfold.methods.dense import Dense
from kvfold.methods.method import Method
from kvfold.methods.registry import build_method
from kvfold.model.loading import LoadedModel, load_model
from kvfold.model.packed import weight_bits

CONCURRENT = 4  # windows that the default KV memory holds at once


@dataclass(frozen=True)
class PerplexityReport:
    """What was measured; bytes are summed over the windows' ends, everything counted.

    loss: relative rise of perplexity over the dense cache. compression: dense 16-bit bytes over bytes held.
    bits_per_element: of everything held; code_bits: of far tokens alone. curve: what `max_loss` measured.
    """

    perplexity: float
    dense_perplexity: float
    loss: float
    tokens: int
    kv_bytes: int
    dense_kv_bytes: int
    compression: float
    bits_per_element: float
    code_bits: float
    seconds: float
    curve: list[Trial]


def evaluate(
    model: str | Path,
    kv: str,
    text: Path,
    *,
    window: int = 2048,
    chunk: int = 128,
    max_tokens: int | None = None,
    start: float = 0.0,
    stop: float = 1.0,
    calibration: Path | None = None,
    dtype: str = "auto",
    weights: str = "auto",
    kv_dtype: str = "auto",
    kv_memory: int | None = None,
    progress: Progress = SILENT,
) -> PerplexityReport:
    """Cuts the part [start, stop) of a text into windows of `window` tokens and scores each as one prompt.

    Of a staged method, which compresses when something has been read, the second half of each window is scored, after
    the first half has been compressed; so is the dense cache it is compared with.
    max_tokens: most tokens of text to use. Raises ConfigError or PromptError for what cannot be evaluated.
    """
    build_method(kv)
    if window < 2 or (max_tokens is not None and max_tokens < 2):
        raise ConfigError("a window and max_tokens below 2 predict nothing; give at least 2")
    content = read_text(text).part(start, stop).content
    compute, raw_bits = resolve_dtypes(dtype, kv_dtype)
    packed = weight_bits(weights)
    loaded = load_model(model, dtype=compute, progress=progress)
    most = loaded.spec.max_positions - 1  # a request has room for one token to generate
    if window > most:
        raise PromptError(f"--window {window} exceeds the {most} tokens that the model takes; choose less")
    windows = _windows(loaded, content, window, max_tokens)
    began = monotonic()
    lane, curve = prepare_lane(loaded, kv, raw_bits, calibration, progress)
    half = len(windows[0]) // 2 if lane.method.staged else None
    lane = replace(lane, method=lane.method.query_agnostic())
    dense = build_lane(loaded.decoder, Dense.name, Method(Dense()), raw_bits)
    lane, dense = pack_lanes(loaded.decoder, (lane, dense), packed)
    if kv_memory is None:
        kv_memory = CONCURRENT * dense.layout.pages(window + 64) * dense.layout.page_bytes
    config = EngineConfig(kv_memory, chunk, chunk * CONCURRENT, prefix_caching=False)

    def scored(which: MethodLane) -> Score:
        engine = Engine(loaded.decoder, loaded.tokenizer, [which], config)
        return score(engine, windows, context=half, what=f"perplexity with {which.label}", progress=progress)

    reference = scored(dense)
    found = reference if lane.method == Method(Dense()) else scored(lane)
    return PerplexityReport(
        perplexity=found.perplexity,
        dense_perplexity=reference.perplexity,
        loss=found.perplexity / reference.perplexity - 1,
        tokens=found.tokens,
        kv_bytes=found.kv_bytes,
        dense_kv_bytes=found.dense_kv_bytes,
        compression=found.dense_kv_bytes / found.kv_bytes,
        bits_per_element=8 * found.kv_bytes / found.elements,
        code_bits=lane.layout.code_bits,
        seconds=round(monotonic() - began, 3),
        curve=curve,
    )


def _windows(model: LoadedModel, content: str, window: int, max_tokens: int | None) -> list[list[int]]:
    ids = model.tokenizer(content, verbose=False)["input_ids"][:max_tokens]
    windows = [ids[i : i + window] for i in range(0, len(ids), window)]
    windows = [w for w in windows if len(w) == window] or windows[:1]
    if not windows or len(windows[0]) < 2:
        raise PromptError("the text has fewer than 2 tokens; give a longer one")
    return windows
