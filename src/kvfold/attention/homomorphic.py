"""Products of codes (HACK, arXiv 2502.03589): what is stored is never brought back to numbers.

With a = s a' + m in a partition of P elements, and likewise b,
sum a b = s_a s_b S(a'b') + m_b s_a S(a') + m_a s_b S(b') + P m_a m_b, and S(b') is stored.
"""

import torch
from torch import Tensor

from kvfold.kv.format import PageFormat, Row
from kvfold.kv.packing import read_codes, read_scales

LEVELS = 255  # of queries and weights


class Codes:
    """One side of blocks uint8 [N, B, bytes of the row] as codes with offsets, steps and sums per partition.

    Keys: partitions [dimension groups] of each token; values: partitions [B] of each dimension.
    """

    def __init__(self, row: Row, block: int, data: Tensor) -> None:
        self.codes = read_codes(row, block, data).float()  # [N, kept, B, block]
        low, step, sums = read_scales(row, block, data)
        assert sums is not None
        # Blocks that nobody wrote may hold any bits; their weights are 0, which must not meet NaN.
        clean = (torch.nan_to_num(x, 0.0, 0.0, 0.0) for x in (low, step, sums))
        self._low, self._step, self._sums = (x[:, :, 0, :, :, 0] for x in clean)

    def scores(self, q: Tensor) -> Tensor:
        """q: [N, n, d] of any scale. Returns [N, n, B * block]."""
        groups = self._low.shape[1]
        parts = q.unflatten(-1, (groups, -1))  # [N, n, groups, P]
        codes, step, low = _rounded(parts)
        keys = self.codes.unflatten(1, (groups, -1)).flatten(3)  # [N, groups, P, rows]
        low_k, step_k, sums_k = (x.flatten(2)[:, :, None] for x in (self._low, self._step, self._sums))
        products = codes.transpose(1, 2) @ keys  # [N, groups, n, rows]
        step, low, total = (x.transpose(1, 2) for x in (step, low, codes.sum(-1, keepdim=True)))
        size = parts.shape[-1]
        found: Tensor = step * step_k * products + low_k * step * total + low * step_k * sums_k + size * low * low_k
        return found.sum(1)

    def weighted(self, weights: Tensor) -> Tensor:
        """weights: [N, n, B * block]. Returns [N, n, kept]."""
        blocks, size = self.codes.shape[2:]
        codes, step, low = _rounded(weights.unflatten(-1, (blocks, size)))  # [N, n, B, block]
        values = self.codes.permute(0, 2, 3, 1)  # [N, B, block, kept]
        low_v, step_v, sums_v = (x[..., 0].transpose(1, 2)[:, :, None] for x in (self._low, self._step, self._sums))
        products = codes.transpose(1, 2) @ values  # [N, B, n, kept]
        step, low, total = (x.transpose(1, 2) for x in (step, low, codes.sum(-1, keepdim=True)))
        summed: Tensor = step * step_v * products + low_v * step * total + low * step_v * sums_v + size * low * low_v
        return summed.sum(1)


def code_sides(fmt: PageFormat, blocks: Tensor) -> tuple[Codes, Codes]:
    """Keys and values of blocks uint8 [N, B, block_bytes] of a format that stores sums."""
    return (
        Codes(fmt.key, fmt.block, blocks[..., : fmt.key_bytes]),
        Codes(fmt.value, fmt.block, blocks[..., fmt.key_bytes : fmt.block_bytes]),
    )


def _rounded(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of 8 bits, steps and offsets per partition, the last dimension of x; [..., P], [..., 1], [..., 1]."""
    low = x.amin(-1, keepdim=True)
    step = (x.amax(-1, keepdim=True) - low).clamp(min=1e-30) / LEVELS
    return ((x - low) / step).round(), step, low
