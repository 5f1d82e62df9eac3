"""Rows of numbers to the bytes of blocks and back: the definition that every kernel is tested against."""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from kvfold.kv.bits import pack, unpack
from kvfold.kv.format import SCALE_BYTES, Field, PageFormat, Row, Scale, unit_tokens

STEPS_PER_OCTAVE = 12  # of a logarithmic step: from 2^-10.7 to 2^10.6, at most 6 % too large
_STEPS = torch.exp2((torch.arange(256) - 128) / STEPS_PER_OCTAVE)
_RAW_DTYPE = {16: torch.bfloat16, 32: torch.float32}


def encode(fmt: PageFormat, key: Tensor, value: Tensor) -> Tensor:
    """Blocks of rows to bytes.

    key, value: [..., block, head_dim] floating point, in code units where the format's scales are static.
    Returns uint8 [..., block_bytes]. Codes out of range are clamped.
    """
    return torch.cat([_encode_row(fmt.key, fmt.block, key), _encode_row(fmt.value, fmt.block, value)], -1)


def decode(fmt: PageFormat, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes of blocks to rows.

    blocks: uint8 [N, B, block_bytes]. Returns float32 keys [N, key.kept, B * block] and values
    [N, value.kept, B * block]: dimension-major, as attention multiplies them.
    """
    return (
        _decode_row(fmt.key, fmt.block, blocks[..., : fmt.key_bytes]),
        _decode_row(fmt.value, fmt.block, blocks[..., fmt.key_bytes : fmt.block_bytes]),
    )


def take_tokens(fmt: PageFormat, blocks: Tensor, tokens: Tensor) -> Tensor:
    """Blocks that hold some of the tokens of other blocks, bit for bit what they were.

    blocks: uint8 [B, block_bytes]; tokens: int64 [n], n a multiple of the block, token t being the t % block-th of
    block t // block. Where scales span the tokens of a block, tokens must come in whole blocks.
    Returns uint8 [n / block, block_bytes].
    """
    if fmt.block == 1 or fmt.whole_blocks:
        return blocks[tokens[:: fmt.block] // fmt.block]
    parts = []
    for row, data in ((fmt.key, blocks[:, : fmt.key_bytes]), (fmt.value, blocks[:, fmt.key_bytes : fmt.block_bytes])):
        parts.append(_taken_codes(row, fmt.block, data, tokens))
        if row.scale_count(fmt.block):
            size = 1 if row.scale is Scale.STEP else SCALE_BYTES
            scales = data[:, row.code_bits * fmt.block // 8 :].unflatten(1, (-1, fmt.block, size))
            parts.append(_regrouped(scales.transpose(0, 1).flatten(1, 2), tokens, fmt.block).flatten(1))
    return torch.cat(parts, -1)


def _taken_codes(row: Row, block: int, data: Tensor, tokens: Tensor) -> Tensor:
    """Codes and raw numbers of `take_tokens`, uint8 [n / block, bytes]."""
    unit = unit_tokens(block)
    taken = [data.new_empty(len(tokens) // block, block // unit, 0)]
    for field, stored in _stored(row, block, data):
        raw = field.bits in _RAW_DTYPE
        each = stored.unflatten(-1, (unit, -1)) if raw else unpack(stored, field.bits, unit)[..., None]
        moved = _regrouped(each.permute(2, 0, 1, 3, 4).flatten(1, 3), tokens, unit)  # [units, dims, unit, bytes]
        packed = moved.flatten(2) if raw else pack(moved[..., 0], field.bits)
        taken.append(packed.flatten(1).unflatten(0, (-1, block // unit)))
    return torch.cat(taken, -1).flatten(1)


def _regrouped(rows: Tensor, tokens: Tensor, size: int) -> Tensor:
    """Tokens of rows [dims, tokens, bytes], `size` of them together, [n / size, dims, size, bytes]."""
    regrouped: Tensor = rows[:, tokens].unflatten(1, (-1, size)).transpose(0, 1)
    return regrouped


@lru_cache(maxsize=4096)
def _fields(row: Row, unit: int) -> tuple[Field, ...]:
    return row.fields(unit)


@lru_cache(maxsize=4096)
def _centre(row: Row) -> Tensor:
    """Middle of the code range of each coded dimension, [kept - raw]: what a static code is counted from."""
    return torch.tensor([(2**bits - 1) / 2 for bits in row.widths[row.raw :]])


def _bytes(x: Tensor, lead: torch.Size) -> Tensor:
    """The bytes of the numbers in x [*lead, ...], uint8 [*lead, n]."""
    return x.clone(memory_format=torch.contiguous_format).view(torch.uint8).reshape(*lead, -1)


def _scale_shape(row: Row, block: int) -> tuple[int, int, int, int]:
    """(dimension groups, dimensions in one, token groups, tokens in one): what shares an offset and a step."""
    if row.scale is Scale.CHANNEL:
        return row.kept, 1, 1, block
    group = row.group or row.kept
    return row.kept // group, group, block, 1


def _encode_row(row: Row, block: int, x: Tensor) -> Tensor:
    x = x[..., : row.kept].transpose(-1, -2).float()  # [..., kept, block]
    lead = x.shape[:-2]
    scales: list[Tensor] = []
    codes = x.new_empty(0)
    if row.kept > row.raw:
        top = 2 * _centre(row)[:, None]
        if row.scale is Scale.STATIC:
            codes = x[..., row.raw :, :] + top / 2
        elif row.scale is Scale.STEP:
            codes, scales = _step(x, top)
        else:
            codes, scales = _scale(row, block, x, top)
        # Infinities clamp like any other outlier; NaN has no code and its conversion to integers is undefined.
        codes = torch.nan_to_num(codes).round_().clamp_(min=0).minimum(top).to(torch.uint8)
        if row.sums:
            groups = codes.reshape(*lead, *_scale_shape(row, block))
            scales.append(groups.sum((-3, -1), dtype=torch.int16))
    unit = unit_tokens(block)
    fields = []
    for field in _fields(row, unit):
        if field.bits in _RAW_DTYPE:
            numbers = x[..., field.start : field.stop, :].to(_RAW_DTYPE[field.bits])
        else:
            numbers = codes[..., field.start - row.raw : field.stop - row.raw, :]
        fields.append(_packed(numbers.unflatten(-1, (-1, unit)).transpose(-2, -3), field.bits))
    parts = [torch.cat(fields, -1).flatten(-2)] if fields else []
    parts += [_bytes(s, lead) for s in scales]
    return torch.cat(parts, -1) if parts else x.new_empty((*lead, 0), dtype=torch.uint8)


def _scale(row: Row, block: int, x: Tensor, top: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Codes [..., kept, block] (not yet rounded) with the offsets and steps they were made with."""
    shape = _scale_shape(row, block)
    groups = x.reshape(*x.shape[:-2], *shape)
    low = groups.amin((-3, -1), keepdim=True)
    levels = top.reshape(shape[0], shape[1], 1, 1).amax(1, keepdim=True)
    step = (groups.amax((-3, -1), keepdim=True) - low) / levels
    # The codes are made with the rounded scales that the reader will see.
    low, step = (s.clamp(-65504, 65504).to(torch.float16) for s in (low, step))
    codes = (groups - low.float()) / step.float().clamp(min=1e-12)
    return codes.reshape(x.shape), [low, step]


def _step(x: Tensor, top: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Codes [..., kept, block] (not yet rounded) around the middle, and the step's byte of each token."""
    step = (2 * x.abs() / top).amax(-2, keepdim=True).clamp(min=1e-30)
    byte = (STEPS_PER_OCTAVE * step.log2()).ceil().clamp(-128, 127) + 128
    return x / _STEPS[byte.long()] + top / 2, [byte.to(torch.uint8)]


def _packed(numbers: Tensor, bits: int) -> Tensor:
    """Codes or raw numbers [..., units, dims, unit] of one field to bytes [..., units, size]."""
    if bits in _RAW_DTYPE:
        return _bytes(numbers, numbers.shape[:-2])
    return pack(numbers, bits).flatten(-2)


def _stored(row: Row, block: int, data: Tensor) -> Iterator[tuple[Field, Tensor]]:
    """The fields of a row's bytes [..., n], each as [..., units, dims, bytes of a unit's tokens]."""
    unit = unit_tokens(block)
    units = data[..., : row.code_bits * block // 8].unflatten(-1, (block // unit, -1)) if row.kept else data
    for field in _fields(row, unit):
        dims = field.stop - field.start
        yield field, units[..., field.offset : field.offset + field.size].unflatten(-1, (dims, -1))


def _decode_row(row: Row, block: int, data: Tensor) -> Tensor:
    n, b = data.shape[:2]
    out = torch.empty(n, row.kept, b, block)
    for field, stored in _stored(row, block, data):
        if field.bits in _RAW_DTYPE:
            numbers = stored.flatten().clone().view(_RAW_DTYPE[field.bits]).view(*stored.shape[:-1], unit_tokens(block))
            out[:, : row.raw].copy_(numbers.permute(0, 3, 1, 2, 4).flatten(3))
    if row.kept > row.raw:
        codes = read_codes(row, block, data)
        coded = out[:, row.raw :]
        if row.scale in (Scale.STATIC, Scale.STEP):
            torch.sub(codes, _centre(row)[:, None, None], out=coded)
            if row.scale is Scale.STEP:
                coded *= _STEPS[data[..., data.shape[-1] - block :].long()][:, None]
        else:
            low, step, _ = read_scales(row, block, data)
            groups = codes.view(n, *_scale_shape(row, block)[:2], b, *_scale_shape(row, block)[2:])
            coded.copy_((groups * step + low).view(n, row.kept, b, block))
    return out.view(n, row.kept, b * block)


def read_codes(row: Row, block: int, data: Tensor) -> Tensor:
    """The codes of blocks uint8 [N, B, bytes of the row], uint8 [N, kept - raw, B, block]."""
    n, b = data.shape[:2]
    codes = torch.empty(n, row.kept - row.raw, b, block, dtype=torch.uint8)
    for field, stored in _stored(row, block, data):
        if field.bits not in _RAW_DTYPE:
            part = unpack(stored, field.bits, unit_tokens(block))  # [N, B, units, dims, unit]
            codes[:, field.start - row.raw : field.stop - row.raw] = part.permute(0, 3, 1, 2, 4).flatten(3)
    return codes


def read_scales(row: Row, block: int, data: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Offsets, steps and, if stored, sums of codes, float32 [N, dimension groups, 1, B, token groups, 1]."""
    n, b = data.shape[:2]
    count = row.scale_count(block)
    each = count * row.scale_bytes // SCALE_BYTES
    numbers = data[..., data.shape[-1] - row.scale_bytes * count :].flatten().clone()  # a view may begin at an odd byte
    dims, _, tokens, _ = _scale_shape(row, block)

    def shaped(raw: Tensor) -> Tensor:
        return raw.view(n, b, dims, tokens).transpose(1, 2).float().reshape(n, dims, 1, b, tokens, 1)

    low, step = (shaped(numbers.view(torch.float16).view(n, b, each)[..., count * i : count * (i + 1)]) for i in (0, 1))
    sums = shaped(numbers.view(torch.int16).view(n, b, each)[..., 2 * count :]) if row.sums else None
    return low, step, sums
