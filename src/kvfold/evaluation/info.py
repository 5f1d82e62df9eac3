"""What a model is and what its cache costs under a method."""

from dataclasses import dataclass
from pathlib import Path

from kvfold.engine.lane import cache_shape
from kvfold.methods.calibrated import flat_statistics
from kvfold.methods.registry import build_method
from kvfold.model.loading import load_spec

LONG = 2**20  # tokens at which bytes per token are told: windows and sinks weigh little there


@dataclass(frozen=True)
class ModelInfo:
    """bytes_per_token: averaged over a very long sequence, everything counted; tokens_in_memory: of one sequence
    that fills the memory, whatever the model's positions.

    A calibrated method gives heads different widths; here they are taken as equal, the total is the same.
    """

    family: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocabulary: int
    max_positions: int
    kv: str
    bytes_per_token: float
    dense_bytes_per_token: int
    memory: int
    tokens_in_memory: int


def describe(model: str | Path, kv: str, memory: int) -> ModelInfo:
    """Reads a model's configuration (not its weights) and lays its cache out. memory: bytes for KV pages."""
    method = build_method(kv)
    spec = load_spec(model)
    shape = cache_shape(spec, 16)
    statistics = flat_statistics(shape) if method.needs_calibration else None
    layout = method.prepare(shape, statistics).layout
    pages = memory // layout.page_bytes
    return ModelInfo(
        family=spec.family,
        layers=spec.n_layers,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        hidden=spec.hidden,
        vocabulary=spec.vocab,
        max_positions=spec.max_positions,
        kv=kv,
        bytes_per_token=layout.pages(LONG) * layout.page_bytes / LONG,
        dense_bytes_per_token=shape.dense_bytes(1),
        memory=memory,
        tokens_in_memory=layout.longest(pages, limit=64 * LONG),
    )
