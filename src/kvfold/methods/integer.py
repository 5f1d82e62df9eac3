"""Plain integers with one offset and step per token: the baselines that other codecs must beat."""

from dataclasses import dataclass
from typing import ClassVar

from kvfold.kv.format import PageFormat, Row, Scale, Segment
from kvfold.methods.base import CacheShape, Facts
from kvfold.methods.quantiser import Quantiser

BLOCK = 16


@dataclass(frozen=True, kw_only=True)
class Int8(Quantiser):
    """`int8`: 8 bits, asymmetric, per token, head and side (keys, values)."""

    name: ClassVar[str] = "int8"
    facts: ClassVar[Facts] = Facts("bits", "")
    bits: ClassVar[int] = 8

    def format(self, shape: CacheShape) -> PageFormat:
        row = Row((Segment(self.bits, shape.head_dim),), Scale.TOKEN)
        return PageFormat(shape.page_bytes, shape.head_dim, BLOCK, row, row)


@dataclass(frozen=True, kw_only=True)
class Int4(Int8):
    """`int4`: 4 bits, asymmetric, per token, head and side (keys, values)."""

    name: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4
