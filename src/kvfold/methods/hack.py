"""HACK (arXiv 2502.03589): attention on the codes themselves, by integer products and a few corrections."""

from dataclasses import dataclass
from typing import ClassVar

from kvfold.errors import ConfigError
from kvfold.kv.format import PageFormat, Row, Scale, Segment
from kvfold.methods.base import CacheShape, Facts
from kvfold.methods.quantiser import Quantiser, check_group


@dataclass(frozen=True, kw_only=True)
class Hack(Quantiser):
    """`hack(bits=2, partition=64)`: keys share an offset and a step per token and `partition` channels, values per
    channel and `partition` tokens, which is the dimension that each is summed over. Queries and attention weights are
    rounded to 8 bits, and products are of codes (`attention/homomorphic.py`; the compiled kernels round to more bits
    and count from the middle, which needs no sums). The sum of the codes of a partition is stored with it (summation
    elimination); values stay in 16 bits until their partition is full (requantisation elimination).

    Deviations: the newest `recent` tokens stay in 16 bits beside the open partition, and so do the sinks.
    """

    bits: int = 2
    partition: int = 64
    recent: int = 64

    name: ClassVar[str] = "hack"
    facts: ClassVar[Facts] = Facts("bits; computes on codes", "2502.03589", "sinks and recent tokens in 16 bits")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in (2, 4, 8):
            raise ConfigError(f"hack has no {self.bits}-bit format; choose bits 2, 4 or 8")
        if self.partition not in (16, 32, 64, 128):
            raise ConfigError(f"hack partition={self.partition} is out of range; choose 16, 32, 64 or 128")

    def format(self, shape: CacheShape) -> PageFormat:
        segments = (Segment(self.bits, shape.head_dim),)
        group = check_group(self.name, "partition", self.partition, shape)
        key = Row(segments, Scale.TOKEN, group, sums=True)
        value = Row(segments, Scale.CHANNEL, sums=True)
        try:
            return PageFormat(shape.page_bytes, shape.head_dim, self.partition, key, value)
        except ValueError as error:
            raise ConfigError(
                f"hack partition={self.partition} at {self.bits} bits does not fit a page ({error}); choose less"
            ) from error
