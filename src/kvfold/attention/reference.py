"""Attention over pages in plain torch, vectorised over tokens, sequences and heads: the definition of the contract."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvfold.attention.base import SequenceStep
from kvfold.attention.group import Group
from kvfold.kv.access import read_blocks, round_trip, write_blocks
from kvfold.kv.format import PageFormat
from kvfold.kv.layout import CacheLayout
from kvfold.kv.packing import decode, encode
from kvfold.kv.pool import PagePool

MAX_SCORES = 2**24  # float32 scores held at once; more queries than that are worked off in tiles


class ReferenceBackend:
    """Implements `AttentionBackend` for every page format, in float32."""

    def plan(self, pool: PagePool, layout: CacheLayout, steps: Sequence[SequenceStep], scale: float) -> "ReferencePlan":
        return ReferencePlan(pool, layout, steps, scale)


class ReferencePlan:
    """Sequences with one new token are worked on together, longer ones one by one (padding would cost more)."""

    def __init__(self, pool: PagePool, layout: CacheLayout, steps: Sequence[SequenceStep], scale: float) -> None:
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
            out[rows], lse[rows] = self._attend(group, layer, q[rows].float() * self._scale, near_k, near_v)
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
            far_k, far_v = self._far(group, layer, fmt, heads)
            near_mask, far_mask = group.near_mask(window), group.far_mask(fmt, window)
            values = near_v[:, heads]
            for mask, rows in ((near_mask, values), (far_mask, far_v)):
                # Rows that nobody wrote may hold NaN, and 0 x NaN is NaN; keys are covered by the scores' mask.
                rows.masked_fill_(~mask.any(1)[:, None, None], 0)
            keys = near_k.shape[-1] + far_k.shape[-1]
            tile = max(1, MAX_SCORES // (n * len(heads) * q.shape[2] * keys))
            for t in range(0, lq, tile):
                part = q[:, heads, :, t : t + tile]
                mask = torch.cat([near_mask[:, t : t + tile], far_mask[:, t : t + tile]], -1)[:, None, None]
                out[:, heads, :, t : t + tile], lse[:, heads, :, t : t + tile] = _softmax_attention(
                    part, mask, (near_k[:, heads], far_k), (values, far_v)
                )
        return out.permute(0, 3, 1, 2, 4).reshape(n, lq, n_heads, d), lse.permute(0, 3, 1, 2).reshape(n, lq, n_heads)

    def _far(self, group: Group, layer: int, fmt: PageFormat, heads: Tensor) -> tuple[Tensor, Tensor]:
        """Sealed keys and values of some heads, float32 [N, heads, kept, rows]."""
        first, last = group.columns(fmt, self._layout.windows[layer])
        pages = group.far_pages(layer)[:, heads, first:last].reshape(group.n * len(heads), -1)
        rows = decode(fmt, read_blocks(self._data, fmt, pages))
        keys, values = (x.view(group.n, len(heads), x.shape[1], x.shape[2]) for x in rows)
        return keys, values


def _softmax_attention(
    q: Tensor, mask: Tensor, keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """q: [N, G, g, Lq, d]; mask: bool, broadcast over the scores; keys and values: near and far [N, G, kept, rows].

    Dimensions beyond the kept ones count as 0 in keys and values.
    """
    n, heads, group, lq, d = q.shape
    flat = q.reshape(n, heads, group * lq, d)
    scores = torch.cat([flat[..., : k.shape[2]] @ k for k in keys], -1).unflatten(2, (group, lq))
    scores.masked_fill_(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp_().flatten(2, 3).split([k.shape[-1] for k in keys], -1)
    out = torch.zeros_like(flat)
    for p, v in zip(weights, values, strict=True):
        out[..., : v.shape[2]] += p @ v.transpose(-1, -2)
    return out.view_as(q), lse
