"""Attention over pages in plain torch, vectorised over tokens, sequences and heads: the definition of the contract."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvfold.attention.base import Plan, SequenceStep
from kvfold.attention.group import Group
from kvfold.attention.products import MAX_SCORES, AnyStored, Stored, merged, stored_rows
from kvfold.attention.staged import StagedPlan
from kvfold.kv.access import read_blocks, round_trip, write_blocks
from kvfold.kv.format import PageFormat
from kvfold.kv.layout import CacheLayout
from kvfold.kv.packing import decode, encode
from kvfold.kv.pool import PagePool
from kvfold.kv.staged import StagedLayout
from kvfold.kv.tables import PageTables


class ReferenceBackend:
    """Implements `AttentionBackend` for every page format, in float32."""

    def plan(
        self, pool: PagePool, layout: CacheLayout | StagedLayout, steps: Sequence[SequenceStep[Any]], scale: float
    ) -> Plan:
        if isinstance(layout, StagedLayout):
            return StagedPlan(pool, layout, steps, scale)
        return ReferencePlan(pool, layout, steps, scale)


class ReferencePlan:
    """Sequences with one new token are worked on together, longer ones one by one (padding would cost more)."""

    def __init__(
        self, pool: PagePool, layout: CacheLayout, steps: Sequence[SequenceStep[PageTables]], scale: float
    ) -> None:
        decoding = [s for s in steps if s.count == 1]
        batches = ([decoding] if decoding else []) + [[s] for s in steps if s.count > 1]
        self._groups = [Group(layout, batch) for batch in batches]
        self._data = pool.data
        self._layout = layout
        self._scale = scale

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        for group in self._groups:
            rows = group.rows
            near_k, near_v = self._near(group, layer, k[rows], v[rows])
            self._store(group, layer, near_k, near_v)
            result, lse[rows] = self._attend(group, layer, q[rows].float() * self._scale, near_k, near_v)
            out[rows] = result.to(q.dtype)
        return out, lse

    def _near(self, group: Group, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """What the near slots hold followed by the new rows, float32 [N, G, d, slots + Lq] each."""
        fmt = self._layout.near
        n, heads = group.n, self._layout.kv_heads
        new = [x.permute(0, 2, 3, 1) for x in round_trip(fmt, k.float(), v.float())]
        pages = group.near_pages(layer)
        if not pages.shape[-1]:
            return new[0], new[1]
        held = decode(fmt, read_blocks(self._data, fmt, pages.reshape(n * heads, -1)))
        keys, values = (
            torch.cat([h.view(n, heads, h.shape[1], h.shape[2]), x], -1) for h, x in zip(held, new, strict=True)
        )
        return keys, values

    def _store(self, group: Group, layer: int, near_k: Tensor, near_v: Tensor) -> None:
        """Seals what leaves the window and puts the new tokens that stay into their near slots."""
        sequence, source, row = group.sealing
        if len(row):
            for fmt, heads in group.formats(layer):
                pages = group.far_pages(layer)[sequence[:: fmt.block], :, row[:: fmt.block] // fmt.capacity][:, heads]
                rows = (x[sequence, :, :, source][:, heads].unflatten(0, (-1, fmt.block)) for x in (near_k, near_v))
                blocks = encode(fmt, *(x.transpose(1, 2) for x in rows))  # [blocks, heads, bytes]
                index = (row[:: fmt.block] % fmt.capacity // fmt.block)[:, None].expand_as(pages)
                write_blocks(self._data, fmt, pages, index, blocks)
        sequence, source, slot = group.keeping
        if len(slot):
            fmt = self._layout.near
            pages = group.near_pages(layer)[sequence, :, slot // fmt.capacity]
            blocks = encode(
                fmt, near_k[sequence, :, :, source].unsqueeze(-2), near_v[sequence, :, :, source].unsqueeze(-2)
            )
            write_blocks(self._data, fmt, pages, (slot % fmt.capacity)[:, None].expand_as(pages), blocks)

    def _attend(self, group: Group, layer: int, q: Tensor, near_k: Tensor, near_v: Tensor) -> tuple[Tensor, Tensor]:
        """q: [N, Lq, H, d] scaled. Returns [N, Lq, H, d] and the log-sum-exp [N, Lq, H]."""
        n, lq, n_heads, d = q.shape
        kv_heads = self._layout.kv_heads
        q = q.view(n, lq, kv_heads, -1, d).permute(0, 2, 3, 1, 4)  # [N, G, g, Lq, d]
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:-1])
        window = self._layout.windows[layer]
        for fmt, heads in group.formats(layer):
            near_mask = group.near_mask(window, self._layout.keeps_sinks(layer))[:, None]
            near = Stored.plain(near_k[:, heads], near_v[:, heads], near_mask)
            far = self._far(group, layer, fmt, heads)
            tile = max(1, MAX_SCORES // (n * len(heads) * q.shape[2] * (near.rows + far.rows)))
            for t in range(0, lq, tile):
                part = slice(t, t + tile)
                result = merged(q[:, heads, :, part], [near.tile(part), far.tile(part)])
                out[:, heads, :, part], lse[:, heads, :, part] = result.out, result.lse
        return out.permute(0, 3, 1, 2, 4).reshape(n, lq, n_heads, d), lse.permute(0, 3, 1, 2).reshape(n, lq, n_heads)

    def _far(self, group: Group, layer: int, fmt: PageFormat, heads: Tensor) -> AnyStored:
        """Sealed keys and values of some heads."""
        window = self._layout.windows[layer]
        first, last = group.columns(fmt, window)
        pages = group.far_pages(layer)[:, heads, first:last].reshape(group.n * len(heads), -1)
        blocks = read_blocks(self._data, fmt, pages)
        mask = group.far_mask(fmt, window)[:, None]
        return stored_rows(fmt, blocks, (group.n, len(heads)), mask, [None] * group.n, layer, heads)
