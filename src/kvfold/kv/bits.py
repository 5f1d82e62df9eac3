"""Streams of bits: codes of 1 to 8 bits one after the other, the first in the lowest bits."""

from math import gcd

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., n] to bytes [..., n * bits / 8], which must be whole."""
    if bits == 8:
        return codes
    together = gcd(8, codes.shape[-1])  # as many as fit into 64 bits whatever their width
    groups = codes.unflatten(-1, (-1, together)).long() << bits * torch.arange(together)
    packed: Tensor = groups.sum(-1, keepdim=True).view(torch.uint8)[..., : together * bits // 8].flatten(-2)
    return packed


def unpack(data: Tensor, bits: int, count: int) -> Tensor:
    """The inverse: uint8 [..., count]."""
    if bits == 8:
        return data
    mask = 2**bits - 1
    if 8 % bits == 0:
        whole: Tensor = ((data[..., None] >> torch.arange(0, 8, bits, dtype=torch.uint8)) & mask).flatten(-2)
        return whole
    first = bits * torch.arange(count)
    low, shift = first // 8, (first % 8).to(torch.uint8)
    high = (low + 1).clamp(max=data.shape[-1] - 1)
    # A shift by 8 leaves nothing.
    codes: Tensor = ((data[..., low] >> shift) | (data[..., high] << (8 - shift))) & mask
    return codes
