"""Weights as the compiled kernels read them (csrc/linear.h): bfloat16, or codes of 8 or 4 bits with scales."""

import torch
from torch import Tensor
from torch.nn.functional import pad

ROWS = 16  # of a block, which lie side by side
GROUPS = {4: 32, 8: 32, 16: 2}  # inputs that share a scale
_CHUNK = 2**22  # weights quantised at a time


def pack(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """weight [rows, inputs] as uint8 codes and bfloat16 scales [blocks, groups, 16], of 4 bits [blocks, groups, 2, 16]
    with the least number of each group second; 16 bits have none."""
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
    return fours.reshape(-1), scales.unflatten(0, (-1, ROWS)).movedim(1, -1).contiguous()


def _quantise8(rows: Tensor) -> tuple[Tensor, Tensor]:
    scale = (rows.abs().amax(-1) / 127).bfloat16()
    return (_divided(rows, scale).clamp_(-127, 127) + 128).to(torch.uint8), scale


def _quantise4(rows: Tensor) -> tuple[Tensor, Tensor]:
    """From the least number of a group in 15 steps to the largest: what most 4-bit files hold is kept as it is."""
    least, most = rows.amin(-1).bfloat16(), rows.amax(-1)
    scale = ((most - least.float()).clamp_(min=0) / 15).bfloat16()
    codes = _divided(rows - least.float()[..., None], scale).clamp_(0, 15).to(torch.uint8)
    return codes, torch.stack((scale, least), -1)


def _divided(rows: Tensor, scale: Tensor) -> Tensor:
    """rows [N, groups, group] in units of the scales [N, groups], rounded; all 0 where a scale is 0."""
    factor = torch.where(scale == 0, 0.0, 1 / scale.float())
    return (rows * factor[..., None]).round_()
