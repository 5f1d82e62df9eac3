"""What one page holds, as data: the same object tells the pool how big, the kernel where, the wire how much.

A page is a whole number of *blocks*. A block holds the key rows and the value rows of `block` consecutive
tokens of one (sequence, layer, KV head); it is what is sealed at once. Within a block each row is a list of
segments, most important dimensions first.

Byte order inside a block: keys, key scales, values, value scales. Keys (and values) come in *units* of 16 tokens (of
the whole block where 16 does not divide it); within a unit one dimension after the other, its codes as one
little-endian stream of bits, token i at bit i * w. So 8 tokens of a w-bit dimension are w bytes, whatever the other
dimensions have.
"""

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

RAW_BITS = (16, 32)  # stored as floating point numbers, not as codes
CODE_BITS = tuple(range(1, 9))
SCALE_BYTES = 2  # float16, one offset and one step each
SUM_BYTES = 2  # int16
UNIT = 16  # tokens whose codes lie together: as many as a vector register has 32-bit lanes


def unit_tokens(block: int) -> int:
    """Tokens of one unit of a block."""
    return block if block % UNIT else UNIT


class Scale(StrEnum):
    """Where the offset and step of integer codes live."""

    STATIC = "static"  # nowhere in the page: rows arrive in code units, centred on the middle of the code range
    TOKEN = "token"  # per token and group of dimensions
    CHANNEL = "channel"  # per dimension of the block
    STEP = "step"  # per token: one byte for the step's logarithm; codes are centred, there is no offset


@dataclass(frozen=True)
class Segment:
    """`dims` consecutive dimensions stored with `bits` bits each."""

    bits: int
    dims: int

    def __post_init__(self) -> None:
        if self.bits not in (*CODE_BITS, *RAW_BITS) or self.dims < 1:
            raise ValueError(f"no such segment: {self.bits} bits x {self.dims} dimensions")


@dataclass(frozen=True)
class Field:
    """The dimensions [start, stop) of `bits` bits: bytes [offset, offset + size) of a unit."""

    bits: int
    start: int
    stop: int
    offset: int
    size: int


@dataclass(frozen=True)
class Row:
    """How the key rows (or the value rows) of one block are laid out.

    `segments` cover a prefix of the head's dimensions; what they leave out is dropped (0 bits) and reads back as 0.
    `group` is the number of dimensions that share a token scale (None: all of them). sums: the sum of the codes that
    share a scale is stored beside it, for attention that multiplies codes (HACK).
    """

    segments: tuple[Segment, ...]
    scale: Scale = Scale.STATIC
    group: int | None = None
    sums: bool = False

    def __post_init__(self) -> None:
        raw = [s.bits in RAW_BITS for s in self.segments]
        if self.scale is not Scale.STATIC and any(raw):
            raise ValueError("raw segments carry no scale")
        if raw != sorted(raw, reverse=True):
            raise ValueError("raw segments come before coded ones")
        if len({s.bits for s in self.segments if s.bits in RAW_BITS}) > 1:
            raise ValueError("raw segments of one row share a width")
        if self.group is not None and (self.scale is not Scale.TOKEN or self.kept % self.group):
            raise ValueError("a group must divide the dimensions of a row with token scales")
        if self.sums and self.scale not in (Scale.TOKEN, Scale.CHANNEL):
            raise ValueError("sums of codes need offsets that they correct")

    @cached_property
    def kept(self) -> int:
        """Dimensions that are stored at all."""
        return sum(s.dims for s in self.segments)

    @cached_property
    def raw(self) -> int:
        """Leading dimensions stored as floating point numbers."""
        return sum(s.dims for s in self.segments if s.bits in RAW_BITS)

    @cached_property
    def raw_bits(self) -> int:
        return next((s.bits for s in self.segments if s.bits in RAW_BITS), 16)

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Bits of each kept dimension."""
        return tuple(s.bits for s in self.segments for _ in range(s.dims))

    @property
    def code_bits(self) -> int:
        """Bits that one token's row takes, scales not counted."""
        return sum(s.bits * s.dims for s in self.segments)

    def scale_count(self, block: int) -> int:
        """Number of scales in one block."""
        if self.scale is Scale.STEP:
            return block if self.kept else 0
        if self.scale is Scale.TOKEN:
            return block * (self.kept // (self.group or self.kept)) if self.kept else 0
        return self.kept if self.scale is Scale.CHANNEL else 0

    def fields(self, unit: int) -> tuple[Field, ...]:
        """Where the dimensions of each segment are in a unit of `unit` tokens."""
        fields: list[Field] = []
        start = offset = 0
        for segment in self.segments:
            size = segment.bits * segment.dims * unit // 8
            fields.append(Field(segment.bits, start, start + segment.dims, offset, size))
            start, offset = start + segment.dims, offset + size
        return tuple(fields)

    def nbytes(self, block: int) -> int:
        """Bytes of one block of this row, scales included."""
        return self.code_bits * block // 8 + self.scale_bytes * self.scale_count(block)

    @property
    def scale_bytes(self) -> int:
        """Bytes of one scale: its offset, step and sum, or the step's logarithm alone."""
        return 1 if self.scale is Scale.STEP else 2 * SCALE_BYTES + SUM_BYTES * self.sums


@dataclass(frozen=True)
class PageFormat:
    """The layout of a page: `page_bytes` bytes that hold `capacity` tokens of one KV head of `head_dim` dimensions.

    Raises ValueError where the widths do not fill whole bytes of a block or where not even one block fits.
    """

    page_bytes: int
    head_dim: int
    block: int
    key: Row
    value: Row

    def __post_init__(self) -> None:
        for row in (self.key, self.value):
            if row.kept > self.head_dim:
                raise ValueError(f"a row of {row.kept} dimensions in a head of {self.head_dim}")
            if any(s.bits * unit_tokens(self.block) % 8 for s in row.segments):
                raise ValueError(
                    f"codes of widths {sorted(set(row.widths))} do not fill whole bytes in blocks of {self.block}"
                )
        if not 0 < self.block_bytes <= self.page_bytes:
            raise ValueError(f"a block of {self.block_bytes} bytes in a page of {self.page_bytes}")

    @cached_property
    def key_bytes(self) -> int:
        return self.key.nbytes(self.block)

    @cached_property
    def block_bytes(self) -> int:
        return self.key_bytes + self.value.nbytes(self.block)

    @cached_property
    def blocks(self) -> int:
        """Blocks per page."""
        return self.page_bytes // self.block_bytes

    @cached_property
    def capacity(self) -> int:
        """Tokens per page."""
        return self.blocks * self.block

    @property
    def whole_blocks(self) -> bool:
        """Whether the tokens of a block can only be kept or dropped together, because they share scales."""
        return Scale.CHANNEL in (self.key.scale, self.value.scale)

    @property
    def bytes_per_token(self) -> float:
        """What one token really takes, the unused end of the page included."""
        return self.page_bytes / self.capacity


def raw_format(page_bytes: int, head_dim: int, bits: int = 16) -> PageFormat:
    """Uncompressed rows of `bits`-bit floating point numbers, one token per block."""
    row = Row((Segment(bits, head_dim),))
    return PageFormat(page_bytes, head_dim, 1, row, row)
