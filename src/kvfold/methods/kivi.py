"""KIVI (arXiv 2402.02750): keys quantised per channel, values per token."""

from dataclasses import dataclass
from typing import ClassVar

from kvfold.errors import ConfigError
from kvfold.kv.format import PageFormat, Row, Scale, Segment
from kvfold.methods.base import CacheShape, Facts
from kvfold.methods.quantiser import Quantiser, check_group


@dataclass(frozen=True, kw_only=True)
class Kivi(Quantiser):
    """`kivi(bits=2)`: keys share an offset and a step per channel and `group` tokens, values per token and `group`
    channels; the newest `recent` tokens stay in 16 bits and leave them `group` at a time. value_bits: another width
    for values.

    Deviations: the first `sinks` tokens stay in 16 bits, too (sinks=0 is the paper); a prompt attends to its own
    far tokens as codes (`staged+kivi` attends to them uncompressed, as the paper's code does).
    """

    bits: int = 2
    value_bits: int | None = None
    group: int = 32

    name: ClassVar[str] = "kivi"
    facts: ClassVar[Facts] = Facts("bits", "2402.02750", "sinks stay in 16 bits")

    def __post_init__(self) -> None:
        super().__post_init__()
        for width in (self.bits, self.width):
            if width not in (2, 4):
                raise ConfigError(f"kivi has no {width}-bit format; choose bits 2 or 4")
        if self.group < 8 or self.group % 8:
            raise ConfigError(f"kivi group={self.group} is out of range; choose a multiple of 8, such as 32")

    @property
    def width(self) -> int:
        """Bits of values."""
        return self.bits if self.value_bits is None else self.value_bits

    def format(self, shape: CacheShape) -> PageFormat:
        key = Row((Segment(self.bits, shape.head_dim),), Scale.CHANNEL)
        group = check_group(self.name, "group", self.group, shape)
        value = Row((Segment(self.width, shape.head_dim),), Scale.TOKEN, group)
        try:
            return PageFormat(shape.page_bytes, shape.head_dim, self.group, key, value)
        except ValueError as error:
            raise ConfigError(f"kivi group={self.group} does not fit a page ({error}); choose fewer tokens") from error
