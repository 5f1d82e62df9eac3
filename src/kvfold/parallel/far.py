"""Attention to sealed rows, wherever they are: the bytes of pages, as they lie in a pool or come over the wire."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvfold.attention.products import merged, stored_rows
from kvfold.kv.format import PageFormat, Row, Scale, Segment, unit_tokens
from kvfold.kv.layout import CacheLayout
from kvfold.kv.packing import decode, encode

TILE = 2**22  # queries x rows looked at together

Blocks = list[Tensor]
"""Sealed units of some heads: per distinct format uint8 [heads, blocks, block_bytes], blocks ascending by position."""


@dataclass(frozen=True)
class HeadFormats:
    """The formats of some KV heads of a layer, heads of one format together."""

    layout: CacheLayout
    layer: int
    heads: tuple[int, ...]
    wire_bits: int = 16

    @cached_property
    def groups(self) -> list[tuple[PageFormat, Tensor]]:
        """Distinct formats, each with the places among `heads` that have it, int64 [n]."""
        found: dict[PageFormat, list[int]] = {}
        for place, head in enumerate(self.heads):
            found.setdefault(self.layout.far[self.layer][head], []).append(place)
        return [(fmt, torch.tensor(places)) for fmt, places in found.items()]

    @cached_property
    def wire(self) -> list[PageFormat]:
        """What travels instead of each format: itself, or coded rows for uncompressed ones where that is asked for."""
        return [narrowed(fmt, self.wire_bits) if self.wire_bits <= 8 else fmt for fmt, _ in self.groups]

    def encode(self, k: Tensor, v: Tensor) -> Blocks:
        """Rows [n, heads, d] of whole units as they would be stored."""
        found = []
        for fmt, places in self.groups:
            rows = (x[:, places].unflatten(0, (-1, fmt.block)).permute(2, 0, 1, 3) for x in (k, v))
            found.append(
                encode(fmt, *rows) if len(k) else torch.empty(len(places), 0, fmt.block_bytes, dtype=torch.uint8)
            )
        return found

    def nbytes(self, units: int) -> int:
        """Bytes of sealed units on the wire."""
        return units * sum(self._unit_bytes)

    @cached_property
    def _unit_bytes(self) -> list[int]:
        """Bytes of one unit on the wire, of the heads of each format."""
        seal = self.layout.seal
        formats = zip(self.wire, self.groups, strict=True)
        return [len(places) * wire.block_bytes * (seal // wire.block) for wire, (_, places) in formats]

    def pack(self, blocks: Blocks) -> Tensor:
        """The blocks of `encode` for the wire, uint8 [nbytes]."""
        pairs = zip(blocks, self.groups, self.wire, strict=True)
        parts = [_transcoded(fmt, wire, own).flatten() for own, (fmt, _), wire in pairs]
        return torch.cat([torch.empty(0, dtype=torch.uint8), *parts])

    def unpack(self, data: Tensor) -> Blocks:
        """Blocks in the formats of `groups` from what `pack` gave."""
        units = len(data) // sum(self._unit_bytes)
        parts = data.split([size * units for size in self._unit_bytes])
        found = []
        for part, wire, (fmt, places) in zip(parts, self.wire, self.groups, strict=True):
            blocks = part.view(len(places), -1, wire.block_bytes) if len(part) else part.new_empty(len(places), 0, 1)
            found.append(_transcoded(wire, fmt, blocks))
        return found


def narrowed(fmt: PageFormat, bits: int) -> PageFormat:
    """The format with codes and a scale per token in place of rows that are uncompressed throughout."""
    if bits * unit_tokens(fmt.block) % 8:
        bits = 8
    return replace(fmt, key=_narrow(fmt.key, bits), value=_narrow(fmt.value, bits))


def _narrow(row: Row, bits: int) -> Row:
    whole = row.kept > 0 and row.raw == row.kept
    return Row((Segment(bits, row.kept),), Scale.TOKEN) if whole else row


def _transcoded(source: PageFormat, target: PageFormat, blocks: Tensor) -> Tensor:
    if not blocks.numel():
        return blocks.new_empty(*blocks.shape[:2], target.block_bytes)
    if source == target:
        return blocks
    rows = (x.mT.unflatten(1, (-1, target.block)) for x in decode(source, blocks))
    return encode(target, *rows)


@dataclass
class Partial:
    """Attention to some of the rows: out float32 [T, H, d], lse float32 [T, H], -inf where a query saw none of them."""

    out: Tensor
    lse: Tensor

    @classmethod
    def empty(cls, queries: int, heads: int, dim: int) -> "Partial":
        return cls(torch.zeros(queries, heads, dim), torch.full((queries, heads), float("-inf")))

    def add(self, other: "Partial", queries: slice = slice(None), heads: slice = slice(None)) -> None:
        """Merges attention to other rows, of some of the queries and heads, by log-sum-exp."""
        own = self.lse[queries, heads]
        total = torch.logaddexp(own, other.lse)
        safe = total.masked_fill(total == float("-inf"), 0)
        mine, theirs = ((x - safe).exp()[..., None] for x in (own, other.lse))
        self.out[queries, heads] = self.out[queries, heads] * mine + other.out * theirs
        self.lse[queries, heads] = total


def attend_far(
    formats: HeadFormats, q: Tensor, positions: NDArray[np.int64], blocks: Blocks, units: NDArray[np.int64]
) -> Partial:
    """Queries against the sealed rows that their positions let them see.

    q: float32 [T, H, d] scaled, of the query heads of `formats.heads`, at ascending positions [T]; units: numbers of
    the units that `blocks` hold, ascending.
    """
    layout, window = formats.layout, formats.layout.windows[formats.layer]
    count, heads, dim = q.shape
    found = Partial.empty(count, heads, dim)
    if not len(units) or not count:
        return found
    starts = layout.sinks + units * layout.seal
    rows = torch.from_numpy((starts[:, None] + np.arange(layout.seal)).ravel())
    where = torch.from_numpy(positions)
    sealed = layout.sealed_each(where + 1)
    grouped = q.unflatten(1, (len(formats.heads), -1))
    tile = max(1, TILE // len(rows))
    for first in range(0, count, tile):
        part = slice(first, min(first + tile, count))
        last = int(np.searchsorted(starts, int(sealed[part].max())))
        begin = 0
        if window is not None:
            begin = int(np.searchsorted(starts + layout.seal - 1, int(where[part].min()) - window, side="right"))
        if begin >= last:
            continue
        seen = rows[begin * layout.seal : last * layout.seal]
        mask = seen < sealed[part, None]
        if window is not None:
            mask &= seen > where[part, None] - window
        asking = mask.any(1).nonzero()[:, 0]
        if not len(asking):
            continue
        own = grouped[part][asking].permute(1, 2, 0, 3)[None]  # [1, G, g, n, d]
        out, lse = torch.zeros_like(own), own.new_zeros(own.shape[:-1])
        for (fmt, places), stored in zip(formats.groups, blocks, strict=True):
            per_unit = layout.seal // fmt.block
            piece = stored[:, begin * per_unit : last * per_unit]
            shape = (1, len(places))
            part_rows = stored_rows(fmt, piece, shape, mask[asking][None, None], [None], formats.layer, places)
            result = merged(own[:, places], [part_rows])
            out[:, places], lse[:, places] = result.out, result.lse
        found.out[first + asking] = out[0].permute(2, 0, 1, 3).flatten(1, 2)
        found.lse[first + asking] = lse[0].permute(2, 0, 1).flatten(1, 2)
    return found
