"""What the kernels must know of one engine step, on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvfold.attention.base import SequenceStep
from kvfold.kv.layout import CacheLayout
from kvfold.kv.pool import NO_PAGE
from kvfold.kv.tables import PageTables


@dataclass(frozen=True)
class StepData:
    """Sequences that one launch serves. All tensors int32 on the device.

    sequences: [N, 4], tokens held before the step, new tokens, first row of the batch, unused. items: [I, 2], sequence
    and first query of each tile of queries. near, far: page tables [N, layers * kv_heads, columns].
    """

    sequences: Tensor
    items: Tensor
    near: Tensor
    far: Tensor

    @classmethod
    def of(
        cls, layout: CacheLayout, steps: Sequence[SequenceStep[Any]], queries: int, device: torch.device
    ) -> "StepData":
        """queries: of one tile."""
        rows = [(step.tables.length, step.count, step.first, 0) for step in steps]
        items = [(i, begin) for i, step in enumerate(steps) for begin in range(0, step.count, queries)]
        far = _empty(layout, len(steps), max(far_columns(layout, step) for step in steps))
        for row, step in zip(far, steps, strict=True):
            held = step.tables.far[:, : far.shape[2]]
            row[:, : held.shape[1]] = held
        near = np.stack([step.tables.near for step in steps])
        arrays = (np.array(rows, np.int32), np.array(items, np.int32), near, far)
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))


class StandingStep:
    """A `StepData` of decoding steps that stays where it is, for a CUDA graph: only what has changed is copied to it.

    It has room for `rows` sequences with `columns` columns of far pages; rows without a sequence have no new token.
    """

    def __init__(self, layout: CacheLayout, rows: int, columns: int, device: torch.device) -> None:
        self._layout = layout
        self._near = np.full((rows, layout.layers * layout.kv_heads, layout.near_pages), NO_PAGE, np.int32)
        self._far = _empty(layout, rows, columns)
        self._seen: list[tuple[ref[PageTables], int] | None] = [None] * rows  # whose tables, at which length
        items = np.stack([np.arange(rows), np.zeros(rows)], 1).astype(np.int32)
        arrays = (np.zeros((rows, 4), np.int32), items, self._near, self._far)
        self.data = StepData(*(torch.from_numpy(array).to(device, copy=True) for array in arrays))

    def update(self, steps: Sequence[SequenceStep[Any]]) -> None:
        """Takes steps of one token each, sequence i in row i."""
        rows = np.zeros((len(self._seen), 4), np.int32)
        for i, step in enumerate(steps):
            rows[i] = step.tables.length, step.count, step.first, 0
            self._update_row(i, step)
        self.data.sequences.copy_(torch.from_numpy(rows))

    def _update_row(self, i: int, step: SequenceStep[Any]) -> None:
        tables: PageTables = step.tables
        seen = self._seen[i]
        first = 0
        if seen is not None and seen[0]() is tables and seen[1] <= tables.length:
            # Behind the last page in use at that time nothing changes but what no query sees any more.
            first = max(0, int(self._layout.far_tokens(seen[1]) // self._layout.capacity.max()) - 1)
        last = far_columns(self._layout, step)
        wanted = np.full((len(tables.far), last - first), NO_PAGE, np.int32)
        held = tables.far[:, first:last]
        wanted[:, : held.shape[1]] = held
        if not np.array_equal(self._far[i, :, first:last], wanted):
            self._far[i, :, first:last] = wanted
            self.data.far[i, :, first:last].copy_(torch.from_numpy(wanted))
        if not np.array_equal(self._near[i], tables.near):
            self._near[i] = tables.near
            self.data.near[i].copy_(torch.from_numpy(self._near[i]))
        self._seen[i] = ref(tables), tables.length


def far_columns(layout: CacheLayout, step: SequenceStep[Any]) -> int:
    """Columns of the far table in use once a step's tokens are in, at least 1."""
    return max(1, int(-(-layout.far_tokens(step.tables.length + step.count) // layout.capacity.min())))


def _empty(layout: CacheLayout, rows: int, columns: int) -> NDArray[np.int32]:
    return np.full((rows, layout.layers * layout.kv_heads, columns), NO_PAGE, np.int32)
