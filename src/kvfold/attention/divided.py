"""One step whose sequences are served by two backends."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvfold.attention.base import AttentionBackend, Plan, SequenceStep
from kvfold.kv.layout import CacheLayout
from kvfold.kv.pool import PagePool
from kvfold.kv.staged import StagedLayout


class DividedPlan:
    """Implements `Plan`: each of `shares` is a backend and the steps that it serves, together all of the lane's."""

    def __init__(
        self,
        pool: PagePool,
        layout: CacheLayout | StagedLayout,
        shares: Sequence[tuple[AttentionBackend, Sequence[SequenceStep[Any]]]],
        scale: float,
    ) -> None:
        self._parts: list[tuple[Tensor, Plan]] = []
        for backend, steps in shares:
            rows = torch.cat([torch.arange(s.first, s.first + s.count) for s in steps])
            own, first = [], 0
            for step in steps:
                own.append(replace(step, first=first))
                first += step.count
            self._parts.append((rows, backend.plan(pool, layout, own, scale)))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        for rows, plan in self._parts:
            out[rows], lse[rows] = plan.attend(layer, q[rows], k[rows], v[rows])
        return out, lse
