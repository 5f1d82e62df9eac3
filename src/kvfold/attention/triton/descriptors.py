"""The formats of a layout as tensors that kernels read, and which kernel reads which head."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.kv.format import UNIT, PageFormat, Row, Scale, unit_tokens
from kvfold.kv.layout import CacheLayout
from kvfold.kv.packing import STEPS_PER_OCTAVE

RAW, PLANES, GATHER = 0, 1, 2  # how a side's rows are read
FIELD_WIDTHS = 17  # 0 to 16 bits
SCALES = {Scale.STATIC: 0, Scale.TOKEN: 1, Scale.CHANNEL: 2, Scale.STEP: 3}
SIDE_FIELDS = 8


@dataclass(frozen=True)
class SideKind:
    """What a kernel has to be compiled for.

    kind: RAW: numbers, one token per block; PLANES: static codes of one width in units of 16 tokens; GATHER:
    everything else, each dimension with its own width. bits: the one width, or 0. scale: of SCALES. full: whether no
    dimension is dropped (where rows are numbers: of neither side).
    """

    kind: int
    bits: int
    scale: int
    full: bool

    @property
    def centred(self) -> bool:
        """Whether rows are read as codes around their middle, and as nothing but them and numbers beside them."""
        return self.kind == PLANES or (self.kind == GATHER and self.scale == SCALES[Scale.STATIC])

    @classmethod
    def of(cls, fmt: PageFormat, row: Row, padded: int) -> "SideKind":
        widths = set(row.widths)
        full = row.kept == padded
        if fmt.block == 1 and row.raw == row.kept:
            both = fmt.key.kept == fmt.value.kept == padded and fmt.page_bytes % 16 == 0
            return cls(RAW, row.raw_bits, 0, both)
        aligned = fmt.key_bytes % 8 == 0 and fmt.block_bytes % 8 == 0
        if row.scale is Scale.STATIC and fmt.block % UNIT == 0 and len(widths) == 1 and not row.raw and aligned:
            return cls(PLANES, widths.pop(), 0, full)
        return cls(GATHER, 0, SCALES[row.scale], full)


@dataclass(frozen=True)
class HeadClass:
    """KV heads of a layer that one launch serves. heads: int32 [n], on the device."""

    key: SideKind
    value: SideKind
    block: int  # tokens that are sealed together
    fields: bool  # whether the kernel of fields can read these rows
    heads: Tensor


def unsupported(layout: CacheLayout) -> str | None:
    """Why the kernels cannot serve a layout, or None."""
    formats = {fmt for layer in layout.far for fmt in layer}
    if any(row.sums for fmt in formats for row in (fmt.key, fmt.value)):
        return "products of codes (HACK)"
    if any(fmt.block != 1 and fmt.block % UNIT for fmt in formats):
        return f"blocks that are no multiple of {UNIT} tokens"
    wide = [fmt for fmt in formats if 32 in (*fmt.key.widths, *fmt.value.widths)]
    if any(fmt.block != 1 or {*fmt.key.widths, *fmt.value.widths} != {32} for fmt in wide):
        return "32-bit numbers beside codes"
    near = layout.near
    if near.key != near.value or near.key.raw != near.head_dim:
        return "near pages that are not plain numbers"
    if layout.page_bytes % 8:
        return "pages whose size is no multiple of 8 bytes"
    return None


class Descriptors:
    """Device tensors that describe every (layer, KV head) of a layout; a head's index is layer * kv_heads + head.

    pages: int32 [heads, 4], tokens per page, tokens per block, bytes per block, unused.
    sides: int32 [heads, 2, 8], keys and values: offset in the block, bytes per unit, kept dimensions, offset of the
    scales in the block, number of scales, dimensions that share one, unused.
    dims: int32 [heads, 2, padded head_dim, 2]: byte offset in the unit and width in bits (0: dropped).
    fields: int32 [heads, 2, 17, 4], of each width the first dimension, the one past the last, the offset in the unit.
    steps: float32 [256], what the byte of a logarithmic step means.
    """

    def __init__(self, layout: CacheLayout, device: torch.device) -> None:
        self.near_bits = layout.near.key.raw_bits
        self.padded = max(16, 1 << (layout.near.head_dim - 1).bit_length())
        formats = [fmt for layer in layout.far for fmt in layer]
        known = {fmt: self._described(fmt) for fmt in set(formats)}
        columns = zip(*(known[fmt] for fmt in formats), strict=True)
        self.pages, self.sides, self.dims, self.fields = (torch.stack(column).to(device) for column in columns)
        self.steps = torch.exp2((torch.arange(256) - 128) / STEPS_PER_OCTAVE).to(device)
        rows = [row for fmt in known if _in_fields(fmt) for row in (fmt.key, fmt.value)]
        self.widths = sum(1 << bits for bits in {bits for row in rows for bits in row.widths})  # one kernel for all
        self.classes = [self._classes(layer, device) for layer in layout.far]

    def _described(self, fmt: PageFormat) -> tuple[Tensor, ...]:
        pages = torch.tensor([fmt.capacity, fmt.block, fmt.block_bytes, 0], dtype=torch.int32)
        sides = torch.zeros(2, SIDE_FIELDS, dtype=torch.int32)
        dims = torch.zeros(2, self.padded, 2, dtype=torch.int32)
        fields = torch.zeros(2, FIELD_WIDTHS, 4, dtype=torch.int32)
        unit = unit_tokens(fmt.block)
        for index, (row, start) in enumerate(((fmt.key, 0), (fmt.value, fmt.key_bytes))):
            scales = start + row.code_bits * fmt.block // 8
            group = row.group or max(row.kept, 1)
            numbers = [start, row.code_bits * unit // 8, row.kept, scales, row.scale_count(fmt.block), group]
            sides[index, : len(numbers)] = torch.tensor(numbers)
            for field in row.fields(unit):
                own = torch.arange(field.stop - field.start)
                dims[index, field.start : field.stop, 0] = field.offset + own * (field.bits * unit // 8)
                dims[index, field.start : field.stop, 1] = field.bits
                if field.bits < FIELD_WIDTHS:
                    place = torch.tensor([field.start, field.stop, field.offset])
                    fields[index, field.bits, :3] = place.int()
        return pages, sides, dims, fields

    def _classes(self, layer: tuple[PageFormat, ...], device: torch.device) -> list[HeadClass]:
        found: dict[tuple[SideKind, SideKind, int, bool], list[int]] = {}
        for head, fmt in enumerate(layer):
            key, value = (SideKind.of(fmt, row, self.padded) for row in (fmt.key, fmt.value))
            found.setdefault((key, value, fmt.block, _in_fields(fmt)), []).append(head)
        return [
            HeadClass(key, value, block, fields, torch.tensor(heads, dtype=torch.int32, device=device))
            for (key, value, block, fields), heads in found.items()
        ]


def _in_fields(fmt: PageFormat) -> bool:
    """Whether rows are static, in whole units, with all dimensions of one width together."""
    for row in (fmt.key, fmt.value):
        bits = [segment.bits for segment in row.segments]
        if row.scale is not Scale.STATIC or len(set(bits)) < len(bits) or 32 in bits:
            return False
    return fmt.block % UNIT == 0
