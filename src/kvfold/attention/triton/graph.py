"""Whole decoding steps as CUDA graphs: one launch for all kernels of a step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvfold.attention.base import Plan, SequenceStep
from kvfold.attention.triton.backend import Part, TritonBackend, TritonPlan
from kvfold.attention.triton.step import StandingStep, far_columns
from kvfold.kv.layout import CacheLayout
from kvfold.kv.pool import PagePool

Forward = Callable[[Tensor, Tensor, Plan], Tensor]


@dataclass
class _Captured:
    """Inputs and output at fixed addresses. graph: None on the CPU, where the step is computed each time."""

    standing: StandingStep
    plan: Plan
    token_ids: Tensor
    positions: Tensor
    out: Tensor
    graph: "torch.cuda.CUDAGraph | None"


class DecodeGraphs:
    """Runs steps with one new token per sequence, all under one layout.

    forward(token_ids int64 [N], positions int64 [N], plan) computes a step's result [N, ...]; it is to launch the same
    kernels whatever the values are. There is one graph per batch size rounded up to a power of 2 and per length rounded
    up likewise in pages; rows without a sequence compute something that nobody reads, and write to no page.
    """

    def __init__(
        self, backend: TritonBackend, pool: PagePool, layout: CacheLayout, scale: float, forward: Forward
    ) -> None:
        self._backend = backend
        self._launcher = backend.launcher(pool, layout)
        self._layout = layout
        self._scale = scale
        self._forward = forward
        self._device = pool.data.device
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._memory: Any = None  # that all graphs share

    def run(self, steps: Sequence[SequenceStep[Any]], token_ids: Tensor, positions: Tensor) -> Tensor:
        """The result for sequences whose row i of the batch is `steps[i]`; valid until the next call.

        Raises ValueError for steps of several tokens.
        """
        if any(step.count != 1 or step.first != i for i, step in enumerate(steps)):
            raise ValueError("a decoding step has one token per sequence, in the order of the batch")
        columns = max(far_columns(self._layout, step) for step in steps)
        key = 1 << (len(steps) - 1).bit_length(), max(8, 1 << (columns - 1).bit_length())
        if key not in self._captured:
            self._captured[key] = self._capture(*key)
        captured = self._captured[key]
        captured.standing.update(steps)
        captured.token_ids[: len(steps)].copy_(token_ids)
        captured.positions[: len(steps)].copy_(positions)
        if captured.graph is None:
            captured.out = self._forward(captured.token_ids, captured.positions, captured.plan)
        else:
            captured.graph.replay()
        return captured.out[: len(steps)]

    def _capture(self, rows: int, columns: int) -> _Captured:
        standing = StandingStep(self._layout, rows, columns, self._device)
        plan = TritonPlan([Part(self._launcher, [], self._backend.decode, True, standing.data)], self._scale)
        token_ids, positions = (torch.zeros(rows, dtype=torch.int64, device=self._device) for _ in range(2))
        if self._device.type == "cpu":
            return _Captured(standing, plan, token_ids, positions, torch.empty(0), None)
        # No row has a sequence yet: the kernels are compiled and nothing is written.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                self._forward(token_ids, positions, plan)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            out = self._forward(token_ids, positions, plan)
        self._memory = graph.pool()
        return _Captured(standing, plan, token_ids, positions, out, graph)
