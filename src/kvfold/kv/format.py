"""What one page holds, as data: the same object tells the pool how big, the kernel where, the wire how much.

A page is a whole number of *blocks*. A block holds the key rows and the value rows of `block` consecutive
tokens of one (sequence, layer, KV head); it is the unit that is sealed at once. Within a block each row is a
list of segments, most important dimensions first, and a segment of an odd width is stored as *planes* of
1, 2, 4 or 8 bits (6 = 4 + 2), so that every plane unpacks with one shift and one mask.

Byte order inside a block: key planes, key scales, value planes, value scales.
A plane of w < 8 bits over n dimensions is `n x (block * w / 8)` bytes; byte j of a dimension holds the tokens
j, j + stride, j + 2 stride, ... (stride = block * w / 8) from its low bits upwards.
"""

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import groupby

RAW_BITS = (16, 32)  # stored as floating point numbers, not as codes
CODE_BITS = tuple(range(1, 9))
SCALE_BYTES = 2  # float16, one offset and one step each
SUM_BYTES = 2  # int16


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
class Plane:
    """`bits` of the dimensions [start, stop), worth 2**shift, at byte `offset` of the row's part of the block."""

    bits: int
    shift: int
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

    def planes(self, block: int) -> tuple[Plane, ...]:
        """The coded dimensions as planes, widest first; neighbouring dimensions share a plane where they can."""
        planes: list[Plane] = []
        offset = self.raw * block * self.raw_bits // 8
        for bits in (8, 4, 2, 1):
            # The widest plane holds the lowest bits, so that widths 4 to 7 share one plane of 4 bits.
            runs = groupby(self.widths[self.raw :], lambda width: (width & bits, width & ~(2 * bits - 1)))  # noqa: B023
            start = self.raw
            for (inside, shift), run in runs:
                stop = start + len(list(run))
                if inside:
                    planes.append(Plane(bits, shift, start, stop, offset, (stop - start) * block * bits // 8))
                    offset += planes[-1].size
                start = stop
        return tuple(planes)

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
            if any(bits * self.block % 8 for bits in (1, 2, 4) for w in row.widths if w < 16 and w & bits):
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
