"""The uncompressed cache, and what all compressed ones are measured against."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvfold.kv.format import raw_format
from kvfold.kv.layout import CacheLayout
from kvfold.methods.base import CacheShape, Facts, Prepared


@dataclass(frozen=True)
class Dense:
    """`none`: every key and value as it is, in pages, in 16 bits (32 where the model runs with dtype float32)."""

    name: ClassVar[str] = "none"
    facts: ClassVar[Facts] = Facts("nothing", "")
    needs_calibration: ClassVar[bool] = False
    knob: ClassVar[str | None] = None

    every: ClassVar[int] = 32

    @property
    def positional(self) -> bool:
        return True

    def stage(self, shape: CacheShape, statistics: Mapping[str, Tensor] | None) -> None:
        return None

    def prepare(self, shape: CacheShape, statistics: Mapping[str, Tensor] | None) -> Prepared:
        fmt = raw_format(shape.page_bytes, shape.head_dim, shape.raw_bits)
        far = ((fmt,) * shape.kv_heads,) * shape.layers
        return Prepared(CacheLayout(far, fmt, sinks=0, recent=0, windows=shape.windows, exact=True))
