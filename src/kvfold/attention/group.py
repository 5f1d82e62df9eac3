"""Sequences that are attended together: index arithmetic that is the same for all layers."""

from collections.abc import Sequence
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

from kvfold.attention.base import SequenceStep
from kvfold.kv.access import all_pages
from kvfold.kv.format import PageFormat
from kvfold.kv.layout import CacheLayout
from kvfold.kv.tables import PageTables

Where = tuple[Tensor, Tensor, Tensor]


class Group:
    """N sequences with the same number Lq of new tokens. All tensors are int64 or bool."""

    def __init__(self, layout: CacheLayout, steps: Sequence[SequenceStep[PageTables]]) -> None:
        self.n = len(steps)
        self.lq = steps[0].count
        self._layout = layout
        self._steps = steps
        self._starts = torch.tensor([s.tables.length for s in steps])
        self._queries = self._starts[:, None] + torch.arange(self.lq)  # [N, Lq] positions
        self._sealed = layout.sealed_each(self._queries + 1)  # [N, Lq]
        shape = (self.n, layout.layers, layout.kv_heads, -1)
        self._near = all_pages([torch.from_numpy(s.tables.near) for s in steps]).view(shape)
        self._far = all_pages([torch.from_numpy(s.tables.far) for s in steps]).view(shape)
        self.near_mask = cache(self._near_mask)
        self.far_mask = cache(self._far_mask)
        self.columns = cache(self._columns)
        self.formats = cache(self._formats)

    @cached_property
    def rows(self) -> Tensor:
        """Rows of the lane's flattened tokens, [N, Lq]."""
        return torch.tensor([s.first for s in self._steps])[:, None] + torch.arange(self.lq)

    def near_pages(self, layer: int) -> Tensor:
        """[N, G, near columns]"""
        return self._near[:, layer]

    def far_pages(self, layer: int) -> Tensor:
        """[N, G, far columns]"""
        return self._far[:, layer]

    @cached_property
    def held(self) -> Tensor:
        """Position that each near slot held before this step, -1 where none or no longer needed, [N, slots]."""
        layout = self._layout
        slot = torch.arange(layout.near_pages * layout.near.capacity)
        start = self._starts[:, None]
        ring = slot - layout.sinks
        size = max(layout.ring, 1)
        # The newest position below `start` that falls on this slot of the ring.
        newest = start - 1 - (start - 1 - layout.sinks - ring) % size
        position = torch.where(slot < layout.sinks, slot.expand(self.n, -1), newest)
        stale = (position < layout.sealed_each(start)) & (slot >= layout.sinks)
        return position.masked_fill((position >= start) | stale | (ring >= size), -1)

    @cached_property
    def sealing(self) -> Where:
        """Tokens sealed in this step: (sequence, index among near slots + new rows, far row), [S] each."""
        layout = self._layout
        found = []
        for i, step in enumerate(self._steps):
            start = step.tables.length
            row = np.arange(layout.far_tokens(start), layout.far_tokens(start + self.lq))
            position = row + layout.sinks
            source = np.where(position < start, layout.slot_of(position), self.held.shape[1] + position - start)
            found.append((np.full_like(row, i), source, row))
        return _joined(found)

    @cached_property
    def keeping(self) -> Where:
        """New tokens that stay near: (sequence, index among near slots + new rows, near slot), [S] each."""
        found = []
        for i, step in enumerate(self._steps):
            start = step.tables.length
            position = np.arange(start, start + self.lq)
            slot = step.tables.near_slots(position, start + self.lq)
            kept = slot >= 0
            source = self.held.shape[1] + position[kept] - start
            found.append((np.full_like(source, i), source, slot[kept]))
        return _joined(found)

    def _near_mask(self, window: int | None, keeps_sinks: bool) -> Tensor:
        """Which near keys each query sees, [N, Lq, slots + Lq]."""
        keys = torch.cat([self.held, self._queries], 1)
        return self._layout.seen_near(self._queries, keys, window, keeps_sinks)

    def _far_mask(self, fmt: PageFormat, window: int | None) -> Tensor:
        """Which far rows each query sees, [N, Lq, columns * capacity]."""
        first, last = self.columns(fmt, window)
        keys = torch.arange(first * fmt.capacity, last * fmt.capacity) + self._layout.sinks
        # Where nothing is lost, the new tokens are attended as they come and not read back.
        boundary = self._starts[:, None].expand_as(self._queries) if self._layout.exact else self._sealed
        mask = keys < boundary[..., None]
        return mask if window is None else mask & (keys > self._queries[..., None] - window)

    def _columns(self, fmt: PageFormat, window: int | None) -> tuple[int, int]:
        """Columns of far pages that any query of the group sees: first, and one past the last."""
        boundary = int(self._starts.max()) if self._layout.exact else int(self._sealed.max())
        last = -(-(boundary - self._layout.sinks) // fmt.capacity)
        first = 0
        if window is not None:
            visible = int(self._starts.min()) - window + 1 - self._layout.sinks
            first = min(max(visible, 0) // fmt.capacity, last)
        return first, last

    def _formats(self, layer: int) -> list[tuple[PageFormat, Tensor]]:
        """The distinct formats of a layer with the KV heads that use each."""
        heads: dict[PageFormat, list[int]] = {}
        for head, fmt in enumerate(self._layout.far[layer]):
            heads.setdefault(fmt, []).append(head)
        return [(fmt, torch.tensor(which)) for fmt, which in heads.items()]


def _joined(parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Where:
    first, second, third = (torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True))
    return first, second, third
