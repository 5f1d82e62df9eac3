"""Rows of numbers as bytes, only the dimensions that each head keeps and nothing between them."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvfold.kv.bits import pack, unpack
from kvfold.kv.format import Row, Scale

LEAST_BITS, MOST_BITS = 4, 8  # of integers
USUAL_CODE = 4  # bits of a stored dimension whose numbers get as many bits on the wire as were asked for
PLAIN = 16
SCALE_BYTES = 2
TOGETHER = 8  # integers packed into whole bytes
# A scale that bfloat16 rounds down by up to 2^-8 would clamp the largest number of its row.
ROUND_UP = 1 + 2**-7


def as_bytes(x: Tensor) -> Tensor:
    """The bytes of a tensor, uint8 [n]."""
    return x.detach().cpu().contiguous().flatten().view(torch.uint8)


def from_bytes(data: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse; the bytes may begin anywhere."""
    return data.clone().view(dtype)


@dataclass(frozen=True)
class Numbers:
    """Rows [n, heads, dim] of which head h keeps the first kept[h] dimensions; the others come back as 0.

    bits: of each kept dimension, one head after the other. 16 (all of them, if there are none): the number in `dtype`,
    which may be float32; fewer: an integer, those of a row and head sharing a step in bfloat16. sizes: what a kept
    dimension's numbers are measured by before the largest of a row is looked for (none: by 1).
    """

    kept: tuple[int, ...]
    dim: int
    dtype: torch.dtype
    bits: tuple[int, ...] = ()
    sizes: tuple[float, ...] = ()

    @classmethod
    def queries(cls, rows: list[Row], group: int, dim: int, dtype: torch.dtype, bits: int) -> "Numbers":
        """Of `group` query heads per KV head, whose keys are stored as `rows` say. A dimension of b-bit codes spans
        2^b of their steps and makes that much of an error: so each bit more of codes is one more of queries."""
        return cls._of(rows, group, dim, dtype, bits, measured=False)

    @classmethod
    def outputs(cls, rows: list[Row], group: int, dim: int, dtype: torch.dtype, bits: int) -> "Numbers":
        """The same of outputs. They are means of values and within the range of the codes, whose steps matter alike."""
        return cls._of(rows, group, dim, dtype, bits, measured=True)

    @classmethod
    def _of(cls, rows: list[Row], group: int, dim: int, dtype: torch.dtype, bits: int, measured: bool) -> "Numbers":
        heads = [row for row in rows for _ in range(group)]
        kept = tuple(row.kept for row in heads)
        if bits > MOST_BITS:
            return cls(kept, dim, dtype)
        codes = [code for row in heads for code in _code_bits(row)]
        # Beside codes a few dimensions may be stored as numbers: in other units, and because they matter.
        mixed = any(code is not None for code in codes)
        plain = PLAIN if mixed else bits
        widths = tuple(plain if c is None else min(MOST_BITS, max(2, c + bits - USUAL_CODE)) for c in codes)
        sizes = tuple(1.0 if c is None or not measured else (2.0**c - 1) / 2 for c in codes)
        return cls(kept, dim, dtype, widths, sizes)

    @cached_property
    def _columns(self) -> Tensor:
        """Where the kept dimensions are in a flattened row, int64 [sum of kept]."""
        columns = [torch.arange(k) + h * self.dim for h, k in enumerate(self.kept)]
        return torch.cat([torch.empty(0, dtype=torch.int64), *columns])

    @cached_property
    def _heads(self) -> Tensor:
        """The head of each kept dimension."""
        return self._columns // self.dim

    @cached_property
    def _levels(self) -> Tensor:
        """Integers of a kept dimension go from -levels to levels, float32; no matter for those sent as numbers."""
        return 2.0 ** (torch.tensor(self.bits, dtype=torch.float32) - 1) - 1

    @cached_property
    def _measures(self) -> Tensor:
        return torch.tensor(self.sizes or (1.0,) * len(self._columns), dtype=torch.float32)

    @cached_property
    def _widths(self) -> list[tuple[int, Tensor]]:
        """Distinct widths of integers, each with the kept dimensions that have it."""
        bits = torch.tensor(self.bits)
        return [(width, (bits == width).nonzero()[:, 0]) for width in sorted({*self.bits} - {PLAIN})]

    @cached_property
    def _plain(self) -> Tensor:
        """The kept dimensions that are sent as numbers though others are not."""
        return torch.tensor([i for i, width in enumerate(self.bits) if width == PLAIN], dtype=torch.int64)

    def nbytes(self, rows: int) -> int:
        if not self.bits:
            return rows * sum(self.kept) * self.dtype.itemsize
        return sum(self._sizes(rows))

    def _sizes(self, rows: int) -> list[int]:
        """Bytes of the steps, of the numbers and of the integers of each width."""
        numbers = rows * len(self._plain) * self.dtype.itemsize
        return [rows * SCALE_BYTES * len(self.kept), numbers, *(_packed(rows, w, which) for w, which in self._widths)]

    def pack(self, x: Tensor) -> Tensor:
        """x [n, heads, dim] of any floating dtype. Returns uint8 [nbytes(n)]."""
        chosen = x.flatten(1)[:, self._columns]
        if not self.bits:
            return as_bytes(chosen.to(self.dtype))
        measured = chosen.float() / self._measures
        measured[:, self._plain] = 0
        largest = torch.zeros(len(x), len(self.kept))
        largest.scatter_reduce_(1, self._heads.expand_as(measured), measured.abs(), "amax")
        step = (largest * ROUND_UP).clamp(min=1e-30).to(torch.bfloat16)
        share = (measured / step.float()[:, self._heads]).clamp_(-1, 1)
        unsigned = (share * self._levels).round_().add_(self._levels).to(torch.uint8)
        parts = [as_bytes(step), as_bytes(chosen[:, self._plain].to(self.dtype))]
        for width, which in self._widths:
            flat = unsigned[:, which].flatten()
            whole = torch.nn.functional.pad(flat, (0, -len(flat) % TOGETHER)).view(-1, TOGETHER)
            parts.append(pack(whole, width).flatten())
        return torch.cat(parts)

    def unpack(self, data: Tensor, rows: int) -> Tensor:
        """float32 [rows, heads, dim]"""
        heads, count = len(self.kept), len(self._columns)
        out = torch.zeros(rows, heads * self.dim)
        if not self.bits:
            out[:, self._columns] = from_bytes(data, self.dtype).view(rows, count).float()
            return out.view(rows, heads, self.dim)
        first, numbers, *parts = data.split(self._sizes(rows))
        step = from_bytes(first, torch.bfloat16).view(rows, heads).float()
        signed = torch.zeros(rows, count)
        for part, (width, which) in zip(parts, self._widths, strict=True):
            flat = unpack(part.view(-1, width), width, TOGETHER).flatten()[: rows * len(which)]
            signed[:, which] = flat.view(rows, len(which)).float()
        signed = (signed - self._levels) / self._levels * step[:, self._heads] * self._measures
        signed[:, self._plain] = from_bytes(numbers, self.dtype).view(rows, len(self._plain)).float()
        out[:, self._columns] = signed
        return out.view(rows, heads, self.dim)


def _packed(rows: int, width: int, which: Tensor) -> int:
    """Bytes of the integers of one width."""
    return -(-rows * len(which) // TOGETHER) * width


def _code_bits(row: Row) -> list[int | None]:
    """Bits of the codes of each kept dimension where a step is the same for all tokens, else None."""
    static = row.scale is Scale.STATIC
    return [bits if static and bits <= MOST_BITS else None for bits in row.widths]
