"""Attention over the tracks of staged sequences, in plain torch: the definition of the contract for them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.attention.base import SequenceStep
from kvfold.attention.products import MAX_SCORES, AnyStored, Stored, merged, stored_rows
from kvfold.kv.access import all_pages, read_blocks, round_trip, write_blocks
from kvfold.kv.format import PageFormat
from kvfold.kv.packing import encode
from kvfold.kv.pool import PagePool
from kvfold.kv.staged import StagedLayout
from kvfold.kv.staged_tables import StagedTables


class StagedPlan:
    """Implements `Plan` for staged layouts: every query sees the stored tokens of all tracks and the new ones up to
    itself, which go to track 0. Keys that a watch is set on have the attention they receive added up."""

    def __init__(
        self, pool: PagePool, layout: StagedLayout, steps: Sequence[SequenceStep[StagedTables]], scale: float
    ) -> None:
        decoding = [s for s in steps if s.count == 1]
        batches = ([decoding] if decoding else []) + [[s] for s in steps if s.count > 1]
        self._groups = [_Group(layout, batch) for batch in batches]
        self._data = pool.data
        self._layout = layout
        self._scale = scale

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        for group in self._groups:
            rows = group.rows
            record_queries(group.steps, layer, q)
            new = round_trip(self._layout.raw, k[rows].float(), v[rows].float())
            self._store(group, layer, *new)
            new_k, new_v = (x.permute(0, 2, 3, 1) for x in new)  # [N, G, d, Lq]
            result, lse[rows] = self._attend(group, layer, q[rows].float() * self._scale, new_k, new_v)
            out[rows] = result.to(q.dtype)
        return out, lse

    def _store(self, group: "_Group", layer: int, k: Tensor, v: Tensor) -> None:
        """k, v: [N, Lq, G, d]"""
        fmt = self._layout.raw
        row = group.held(0, layer)[:, None] + torch.arange(group.lq)[:, None]  # [N, Lq, G]
        pages = group.pages(0, layer).gather(2, (row // fmt.capacity).transpose(1, 2)).transpose(1, 2)
        write_blocks(self._data, fmt, pages, row % fmt.capacity, encode(fmt, k.unsqueeze(-2), v.unsqueeze(-2)))

    def _attend(self, group: "_Group", layer: int, q: Tensor, new_k: Tensor, new_v: Tensor) -> tuple[Tensor, Tensor]:
        """q: [N, Lq, H, d] scaled. Returns [N, Lq, H, d] and the log-sum-exp [N, Lq, H]."""
        n, lq, n_heads, d = q.shape
        q = q.view(n, lq, self._layout.kv_heads, -1, d).permute(0, 2, 3, 1, 4)  # [N, G, g, Lq, d]
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:-1])
        for heads in group.alike(layer):
            parts = list(self._parts(group, layer, heads))
            fresh = Stored.plain(new_k[:, heads], new_v[:, heads], group.new_mask(layer))
            keys = sum(p.stored.rows for p in parts) + lq
            tile = max(1, MAX_SCORES // (n * len(heads) * q.shape[2] * keys))
            for t in range(0, lq, tile):
                part = slice(t, min(t + tile, lq))
                stored = [p.stored.tile(part) for p in parts] + [fresh.tile(part)]
                watched = group.watched(part).nonzero()[:, 0]
                result = merged(q[:, heads, :, part], stored, watched)
                out[:, heads, :, part], lse[:, heads, :, part] = result.out, result.lse
                if len(watched):
                    visible = [
                        s.tile(watched).mask.expand(w.shape[0], w.shape[1], *w.shape[3:])
                        for s, w in zip(stored, result.weights, strict=True)
                    ]
                    group.observe(layer, heads, t + watched, [p.track for p in parts], visible, result.weights)
        return out.permute(0, 3, 1, 2, 4).reshape(n, lq, n_heads, d), lse.permute(0, 3, 1, 2).reshape(n, lq, n_heads)

    def _parts(self, group: "_Group", layer: int, heads: Tensor) -> Iterator["_Part"]:
        """The tracks of some heads, which share their formats, that hold anything."""
        for track in range(self._layout.tracks):
            held = group.held(track, layer)[:, heads]  # [N, heads]
            most = int(held.max())
            if not most:
                continue
            fmt = self._layout.format(track, layer, int(heads[0]))
            pages = group.pages(track, layer)[:, heads, : -(-most // fmt.capacity)]
            blocks = read_blocks(self._data, fmt, pages.flatten(0, 1))
            bases = [step.tables.bases[track - 1] if track else None for step in group.steps]
            mask = group.track_mask(track, layer, held, blocks.shape[1] * fmt.block)
            yield _Part(track, stored_rows(fmt, blocks, (group.n, len(heads)), mask, bases, layer, heads))


def record_queries(steps: Sequence[SequenceStep[StagedTables]], layer: int, q: Tensor) -> None:
    """Shows the new queries [T, H, d] of a layer to whoever keeps a record of them."""
    for step in steps:
        for record in step.tables.records.values():
            own = q[step.first : step.first + step.count].float()
            record.add(layer, own, step.tables.length, step.tables.next_event)


@dataclass(frozen=True)
class _Part:
    track: int
    stored: AnyStored


class _Group:
    """N sequences with the same number Lq of new tokens: what is the same for all layers."""

    def __init__(self, layout: StagedLayout, steps: Sequence[SequenceStep[StagedTables]]) -> None:
        self.n, self.lq = len(steps), steps[0].count
        self.steps = steps
        self._layout = layout
        self.rows = torch.tensor([s.first for s in steps])[:, None] + torch.arange(self.lq)
        shape = (self.n, layout.tracks, layout.layers, layout.kv_heads)
        self._held = torch.stack([torch.from_numpy(s.tables.rows) for s in steps]).view(shape)
        columns = max(s.tables.pages_of.shape[-1] for s in steps)
        self._pages = all_pages([torch.from_numpy(s.tables.pages_of) for s in steps]).view(*shape, columns)
        self._causal = torch.ones(self.lq, self.lq, dtype=torch.bool).tril()
        # Per sequence and watch which of the new queries count.
        self._watches = [
            {w: w.queries(t.length, self.lq, t.next_event, t.context) for w in t.mass}
            for t in (s.tables for s in steps)
        ]

    def held(self, track: int, layer: int) -> Tensor:
        """Tokens in a track before this step, int64 [N, G]."""
        return self._held[:, track, layer]

    def pages(self, track: int, layer: int) -> Tensor:
        """int64 [N, G, columns]"""
        return self._pages[:, track, layer]

    def alike(self, layer: int) -> list[Tensor]:
        """The KV heads of a layer, those with the same formats in all tracks together."""
        heads: dict[tuple[PageFormat, ...], list[int]] = {}
        for head in range(self._layout.kv_heads):
            key = tuple(self._layout.format(track, layer, head) for track in range(self._layout.tracks))
            heads.setdefault(key, []).append(head)
        return [torch.tensor(which) for which in heads.values()]

    def new_mask(self, layer: int) -> Tensor:
        """Which new tokens each query sees, [1, 1, Lq, Lq]."""
        window = self._layout.windows[layer]
        mask = self._causal if window is None else self._causal & ~self._causal.tril(-window)
        return mask[None, None]

    def track_mask(self, track: int, layer: int, held: Tensor, rows: int) -> Tensor:
        """Which stored rows each query sees, [N, heads, 1 or Lq, rows]; held: [N, heads]."""
        row = torch.arange(rows)
        mask = (row < held[..., None])[:, :, None]
        window = self._layout.windows[layer]
        if window is None:
            return mask
        # In layers with a window nothing is dropped inside it: rows are the newest tokens, one after the other.
        distance = held[..., None, None] - row + torch.arange(self.lq)[:, None]
        return mask & (distance < window)

    def watched(self, part: slice) -> Tensor:
        """Which of the new queries `part` any watch of any sequence is on, bool [n]."""
        none = torch.zeros(self.lq, dtype=torch.bool)
        return torch.stack([none, *(mask for own in self._watches for mask in own.values())]).any(0)[part]

    def observe(
        self,
        layer: int,
        heads: Tensor,
        watched: Tensor,
        tracks: list[int],
        visible: list[Tensor],
        weights: list[Tensor],
    ) -> None:
        """Adds up what keys received from the new queries `watched` [W]. visible, weights: per part (tracks, then new
        tokens) which keys each of them sees [N, heads, W, rows] and how much it attends to them [N, heads, g, W, rows].
        """
        flat = layer * self._layout.kv_heads + heads
        for i, (step, watches) in enumerate(zip(self.steps, self._watches, strict=True)):
            for watch, queries in watches.items():
                which = queries[watched]
                if not which.any():
                    continue
                if watch.power:
                    sums = [(w[i][:, :, which] ** watch.power).sum((1, 2)) for w in weights]  # [heads, rows]
                else:  # not from the weights: small ones are rounded to 0
                    sums = [w.shape[2] * m[i][:, which].sum(1) for m, w in zip(visible, weights, strict=True)]
                mass = step.tables.mass[watch]
                for track, received in zip(tracks, sums, strict=False):
                    width = min(received.shape[1], mass[track].shape[1])
                    mass[track][flat, :width] += received[:, :width]
                new = self.held(0, layer)[i, heads, None] + torch.arange(self.lq)
                mass[0][flat[:, None], new] += sums[-1]
