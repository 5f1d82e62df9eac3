"""Weights as the compiled kernels read them (csrc/linear.h): bfloat16, or codes of 8 or 4 bits with scales."""

import torch
from torch import Tensor
from torch.nn.functional import pad

ROWS = 16  # of a block, which lie side by side
GROUPS = {4: 32, 8: 64, 16: 2}  # inputs that share a scale
_CHUNK = 2**22  # weights quantised at a time


def pack(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """weight [rows, inputs] as (uint8 codes, bfloat16 scales [blocks, groups, 16]); 16 bits have no scales."""
    group = GROUPS[bits]
    step = max(ROWS, _CHUNK // weight.shape[1] // ROWS * ROWS)
    parts = []
    for part in weight.split(step):
        rows = pad(part.float(), (0, -part.shape[1] % group, 0, -len(part) % ROWS))
        parts.append(_pack_plain(rows) if bits == 16 else _pack_codes(rows.unflatten(1, (-1, group)), bits))
    codes, scales = (torch.cat(each) for each in zip(*parts, strict=True))
    return codes, scales


def _pack_plain(rows: Tensor) -> tuple[Tensor, Tensor]:
    codes = rows.bfloat16().view(-1, ROWS, rows.shape[1] // 2, 2).transpose(1, 2)
    return codes.reshape(-1).view(torch.uint8), torch.empty(0, dtype=torch.bfloat16)


def _pack_codes(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """rows: float32 [N, groups, group]"""
    codes, scales = _quantise8(rows) if bits == 8 else _quantise4(rows)
    fours = codes.view(-1, ROWS, rows[0].numel() // 4, 4).transpose(1, 2)  # [blocks, K / 4, 16, 4]
    if bits == 4:
        fours = fours[:, ::2] | fours[:, 1::2] << 4
    return fours.reshape(-1), scales.view(-1, ROWS, rows.shape[1]).transpose(1, 2).contiguous()


def _quantise8(rows: Tensor) -> tuple[Tensor, Tensor]:
    scale = (rows.abs().amax(-1) / 127).bfloat16()
    return (_codes(rows, scale, -127, 127) + 128).to(torch.uint8), scale


def _quantise4(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The extreme number of a group becomes -8, or less where clipping it leaves a smaller squared error."""
    extreme = rows.gather(-1, rows.abs().argmax(-1, keepdim=True))[..., 0]
    best = torch.full_like(extreme, torch.inf)
    codes, scale = rows.new_empty(rows.shape, dtype=torch.uint8), extreme.bfloat16()
    for level in (8.0, 7.4, 8.6, 9.3, 6.8):
        tried = (extreme / -level).bfloat16()
        own = _codes(rows, tried, -8, 7)
        error = (own * tried.float()[..., None] - rows).square_().sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, tried, scale)
        codes = torch.where(better[..., None], (own + 8).to(torch.uint8), codes)
    return codes, scale


def _codes(rows: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """int16 codes of rows [N, groups, group] for the scales [N, groups]; all 0 where a scale is 0."""
    factor = torch.where(scale == 0, 0.0, 1 / scale.float())
    return (rows * factor[..., None]).round_().clamp_(low, high).to(torch.int16)
