"""Codecs in which all heads store all tokens alike, and what is known of a token when it is coded is its position."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvfold.errors import ConfigError
from kvfold.kv.format import PageFormat, raw_format
from kvfold.kv.layout import CacheLayout
from kvfold.methods.base import CacheShape, Encoder, Facts, Prepared

MOST_NEAR = 2**20  # tokens; more than any model reads


def check_near(name: str, sinks: int, recent: int) -> None:
    """Raises ConfigError unless they can be numbers of tokens that stay in 16 bits."""
    if not (0 <= sinks <= MOST_NEAR and 1 <= recent <= MOST_NEAR):
        raise ConfigError(f"{name} needs sinks >= 0 and recent >= 1, both at most {MOST_NEAR}")


@dataclass(frozen=True, kw_only=True)
class Quantiser:
    """A codec with one page format. sinks, recent: first and newest tokens that stay in 16 bits."""

    sinks: int = 4
    recent: int = 128

    name: ClassVar[str]
    facts: ClassVar[Facts]
    needs_calibration: ClassVar[bool] = False
    knob: ClassVar[str | None] = None
    every: ClassVar[int] = 32

    def __post_init__(self) -> None:
        check_near(self.name, self.sinks, self.recent)

    @property
    def positional(self) -> bool:
        return True

    def format(self, shape: CacheShape) -> PageFormat:
        """How tokens are stored. Raises ConfigError where the model's heads cannot be cut this way."""
        raise NotImplementedError

    def prepare(self, shape: CacheShape, statistics: Mapping[str, Tensor] | None) -> Prepared:
        near = raw_format(shape.page_bytes, shape.head_dim, shape.raw_bits)
        return Prepared(CacheLayout(self._formats(shape), near, self.sinks, self.recent, shape.windows))

    def stage(self, shape: CacheShape, statistics: Mapping[str, Tensor] | None) -> Encoder:
        return Encoder((self._formats(shape),), self.sinks, self.recent)

    def _formats(self, shape: CacheShape) -> tuple[tuple[PageFormat, ...], ...]:
        return ((self.format(shape),) * shape.kv_heads,) * shape.layers


def check_group(name: str, field: str, group: int, shape: CacheShape) -> int:
    """Dimensions that share a scale: `group`, or the whole head where it is smaller. Raises ConfigError where
    `group` does not divide the head."""
    size = min(group, shape.head_dim)
    if shape.head_dim % size:
        raise ConfigError(f"{name} {field}={group} does not divide the model's head_dim of {shape.head_dim}")
    return size
