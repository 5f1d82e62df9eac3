"""What the kernels must know of one engine step, on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvfold.attention.base import SequenceStep
from kvfold.kv.layout import CacheLayout
from kvfold.kv.pool import NO_PAGE


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
        cls,
        layout: CacheLayout,
        steps: Sequence[SequenceStep[Any]],
        queries: int,
        device: torch.device,
        columns: int = 0,
    ) -> "StepData":
        """queries: of one tile; columns: of `far` at least."""
        rows = [(step.tables.length, step.count, step.first, 0) for step in steps]
        items = [(i, begin) for i, step in enumerate(steps) for begin in range(0, step.count, queries)]
        columns = max(1, columns, *(far_columns(layout, step) for step in steps))
        far = np.full((len(steps), layout.layers * layout.kv_heads, columns), NO_PAGE, np.int32)
        for row, step in zip(far, steps, strict=True):
            held = step.tables.far[:, :columns]
            row[:, : held.shape[1]] = held
        near = np.stack([step.tables.near for step in steps])
        arrays = (np.array(rows, np.int32), np.array(items, np.int32), near, far)
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))


def far_columns(layout: CacheLayout, step: SequenceStep[Any]) -> int:
    """Columns of the far table in use once a step's tokens are in."""
    return int(-(-layout.far_tokens(step.tables.length + step.count) // layout.capacity.min()))
