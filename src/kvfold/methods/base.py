"""What a method is made of, and what it may know of a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from kvfold.kv.layout import CacheLayout

PAGE_TOKENS = 32  # dense 16-bit tokens in one page


@dataclass
class AttentionWeights:
    """The weights of one layer's attention that a method may fold its maps into; [out, in] as in torch's linear.

    qkv: [(H + 2G) * d, D] with rows ordered queries, keys, values; out: [D, H * d].
    Maps are applied after RoPE: q'[t, h] = q[t, h] @ query_map[h // g], k'[t, j] = k[t, j] @ key_map[j] + key_shift[j].
    """

    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    query_map: Tensor | None = None  # [G, d, d]
    key_map: Tensor | None = None  # [G, d, d]
    key_shift: Tensor | None = None  # [G, d]


@dataclass(frozen=True)
class CacheShape:
    """What a method needs to know of a model to lay out its cache."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    rope: bool
    raw_bits: int = 16  # width of an uncompressed element, 16 or 32

    @property
    def page_bytes(self) -> int:
        return PAGE_TOKENS * 2 * self.head_dim * 2

    def dense_bytes(self, tokens: int) -> int:
        """Bytes of a 16-bit cache of `tokens` tokens, nothing dropped: what compression is measured against."""
        return self.layers * self.kv_heads * self.head_dim * 2 * 2 * tokens


class Transform(Protocol):
    """A change of the weights that makes the model produce rows in the codec's units."""

    def __call__(self, layer: int, weights: AttentionWeights) -> AttentionWeights:
        """New weights for one layer; the given ones are left as they are."""
        ...


@dataclass(frozen=True)
class Prepared:
    """A codec made ready for one model: where the bytes go, and what the weights become (None: nothing)."""

    layout: CacheLayout
    transform: Transform | None = None


class Codec(Protocol):
    """How rows become bytes. The fields of a method's dataclass are its parameters in `name(field=value)`."""

    name: ClassVar[str]
    needs_calibration: ClassVar[bool]
    shares_prefixes: ClassVar[bool]  # the bytes of a token depend on the tokens before it alone

    def prepare(self, shape: CacheShape, statistics: Mapping[str, Tensor] | None) -> Prepared:
        """Lays out the cache. `statistics`: the artifact's tensors, for methods that need calibration."""
        ...
