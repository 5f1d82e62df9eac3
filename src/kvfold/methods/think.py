"""ThinK (arXiv 2407.21018): key channels that the queries do not use are not stored."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvfold.errors import ConfigError
from kvfold.kv.format import PageFormat, Row, Segment
from kvfold.kv.frame import Basis, Selected
from kvfold.methods.base import CacheShape, Encoder, Facts, Prepared
from kvfold.methods.choice import ranked
from kvfold.methods.held import HeldRows
from kvfold.methods.quantiser import check_near

WINDOW = 32  # queries before the event that channels are judged by


@dataclass
class QuerySquares:
    """Sum of the squared entries of the last `WINDOW` queries before an event, float32 [layers, G, d]."""

    total: Tensor

    def add(self, layer: int, q: Tensor, first: int, event: int) -> None:
        last = q[max(0, event - WINDOW - first) :]
        self.total[layer] += last.square().sum(0).unflatten(0, (self.total.shape[1], -1)).sum(1)

    def copy(self) -> "QuerySquares":
        return QuerySquares(self.total.clone())

    @property
    def state(self) -> Mapping[str, Tensor]:
        return {"total": self.total}

    @property
    def nbytes(self) -> int:
        return self.total.nbytes


@dataclass(frozen=True, kw_only=True)
class Think:
    """`think(keep=0.6)`: of each head's key channels the share `keep` with the largest mean q^2 x mean k^2 is stored,
    with an index of which they are; values and the newest `recent` tokens are stored whole.

    Channels are chosen once, when the prompt (or context) is read, and hold for later tokens, too.
    Deviations: squares of a group's query heads are added; the paper uses it after SnapKV (`snapkv+think`).
    """

    keep: float = 0.6
    sinks: int = 0
    recent: int = 32

    name: ClassVar[str] = "think"
    facts: ClassVar[Facts] = Facts("key channels", "2407.21018", "squares of a group's query heads are added")
    needs_calibration: ClassVar[bool] = False
    observes: ClassVar[str] = "queries and keys"
    knob: ClassVar[str | None] = "keep"
    every: ClassVar[int] = 32

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ConfigError(f"think keep={self.keep} is not a share between 0 and 1; 0.6 drops 40 % of the channels")
        check_near(self.name, self.sinks, self.recent)

    @property
    def positional(self) -> bool:
        return False

    def prepare(self, shape: CacheShape, statistics: Mapping[str, Tensor] | None) -> Prepared:
        raise NotImplementedError("think is always staged")

    def stage(self, shape: CacheShape, statistics: Mapping[str, Tensor] | None) -> Encoder:
        kept = max(1, round(self.keep * shape.head_dim))
        key, value = (Row((Segment(shape.raw_bits, dims),)) for dims in (kept, shape.head_dim))
        fmt = PageFormat(shape.page_bytes, shape.head_dim, 1, key, value)

        def fit(held: HeldRows, classes: Tensor) -> list[Basis | None]:
            squares = held.record(self.name)
            assert isinstance(squares, QuerySquares)
            index = torch.zeros(shape.layers, shape.kv_heads, kept, dtype=torch.int16)
            for layer, model_layer in enumerate(held.model_layers):
                worth = squares.total[model_layer] * held.rows(layer)[0].square().sum(1)
                best = ranked(worth)[:, :kept]
                index[model_layer] = best.sort(-1).values.to(torch.int16)
            return [Basis(Selected(index, shape.head_dim), None)]

        record = {self.name: lambda: QuerySquares(torch.zeros(shape.layers, shape.kv_heads, shape.head_dim))}
        formats = ((fmt,) * shape.kv_heads,) * shape.layers
        channels = 2 * shape.layers * shape.kv_heads * kept
        return Encoder((formats,), self.sinks, self.recent, fit=fit, records=record, basis_bytes=channels)
