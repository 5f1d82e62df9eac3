"""What a method is made of, and what it may know of a model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

from torch import Tensor

from kvfold.kv.format import PageFormat
from kvfold.kv.frame import Basis
from kvfold.kv.layout import CacheLayout
from kvfold.kv.staged import Watch
from kvfold.kv.staged_tables import QueryRecord

if TYPE_CHECKING:
    from kvfold.methods.held import HeldRows

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
    frequencies: tuple[tuple[float, ...] | None, ...] = ()  # RoPE's inverse frequencies of each layer

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


@dataclass(frozen=True)
class Facts:
    """What a user wants to know of a method before choosing it; `kvfold methods` prints it."""

    saves: str
    paper: str
    deviations: str = "none"


@dataclass(frozen=True)
class Encoder:
    """How the tokens of a staged cache are coded.

    formats: [class][layer][KV head]; shares: the largest share of tokens that each class takes. sinks, recent:
    tokens that stay as they are. fit: the coordinates of each class, made at a sequence's first event from what
    is held and the class that each token gets (0: none); None: the model's own. classify: class of each token that
    is about to be coded (the mask it is given), int64 [layers, G, R] from 1 on (None: all 1). enough: tokens of a head,
    on average, that there must be to fit to; before that none is coded. watches, records: what fit and classify
    need to have been observed. basis_bytes: what a sequence holds for its coordinates. shared: of each class, what
    coordinates are made from and all sequences have in common.
    """

    formats: tuple[tuple[tuple[PageFormat, ...], ...], ...]
    sinks: int
    recent: int
    shares: tuple[float, ...] = (1.0,)
    fit: "Callable[[HeldRows, Tensor], Sequence[Basis | None]] | None" = None
    classify: "Callable[[HeldRows, Tensor], Tensor] | None" = None
    enough: int = 0
    watches: tuple[Watch, ...] = ()
    records: Mapping[str, Callable[[], QueryRecord]] = field(default_factory=dict)
    basis_bytes: int = 0
    shared: Sequence[Basis] = ()


class Codec(Protocol):
    """How rows become bytes. The fields of a method's dataclass are its parameters in `name(field=value)`.

    `prepare` is for codecs that code a token by its position alone (`positional`), `stage` for staged caches; most
    codecs do both.
    """

    name: ClassVar[str]
    facts: ClassVar[Facts]
    needs_calibration: ClassVar[bool]
    knob: ClassVar[str | None]  # the parameter that trades quality for bytes

    @property
    def positional(self) -> bool:
        """Whether `prepare` is to be used where no policy asks for a staged cache."""
        ...

    @property
    def every(self) -> int:
        """Generated tokens between two events of a cache that is staged for this codec's sake."""
        ...

    def prepare(self, shape: CacheShape, statistics: Mapping[str, Tensor] | None) -> Prepared:
        """Lays out the cache. `statistics`: the artifact's tensors, for methods that need calibration."""
        ...

    def stage(self, shape: CacheShape, statistics: Mapping[str, Tensor] | None) -> Encoder | None:
        """How a staged cache is coded; None: not at all."""
        ...
