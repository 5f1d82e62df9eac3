"""The Triton backend: plans of launches for one step."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvfold.attention.base import Plan, SequenceStep
from kvfold.attention.reference import ReferenceBackend
from kvfold.attention.triton.descriptors import Descriptors, unsupported
from kvfold.attention.triton.launch import DECODE, PREFILL, Launcher, Tuning
from kvfold.attention.triton.step import StepData
from kvfold.errors import ConfigError
from kvfold.kv.layout import CacheLayout
from kvfold.kv.pool import PagePool
from kvfold.kv.staged import StagedLayout


@dataclass
class TritonBackend:
    """Implements `AttentionBackend` with Triton kernels, on the device where the pool lives.

    What the kernels do not know (staged layouts, products of codes, odd blocks) goes to the reference, as long as the
    pool is in the CPU's memory; on a GPU that is a ConfigError.
    """

    decode: Tuning = DECODE
    prefill: Tuning = PREFILL
    _launchers: "WeakKeyDictionary[CacheLayout, tuple[PagePool, Launcher]]" = field(default_factory=WeakKeyDictionary)

    def plan(
        self, pool: PagePool, layout: CacheLayout | StagedLayout, steps: Sequence[SequenceStep[Any]], scale: float
    ) -> Plan:
        reason = "staged layouts" if isinstance(layout, StagedLayout) else unsupported(layout)
        if reason is not None or isinstance(layout, StagedLayout):
            if pool.data.device.type != "cpu":
                raise ConfigError(
                    f"the triton backend does not know {reason}; choose another method or run it on the CPU"
                )
            return ReferenceBackend().plan(pool, layout, steps, scale)
        return TritonPlan(self.launcher(pool, layout), steps, scale, self.decode, self.prefill)

    def launcher(self, pool: PagePool, layout: CacheLayout) -> Launcher:
        """What is the same in all steps, made once for a layout and a pool."""
        known = self._launchers.get(layout)
        if known is None or known[0] is not pool:
            known = pool, Launcher(pool, layout, Descriptors(layout, pool.data.device))
            self._launchers[layout] = known
        return known[1]


class TritonPlan:
    """Sequences with one new token go through one launch, all others through another."""

    def __init__(
        self, launcher: Launcher, steps: Sequence[SequenceStep[Any]], scale: float, decode: Tuning, prefill: Tuning
    ) -> None:
        self._launcher = launcher
        self._scale = scale
        self._tokens = sum(step.count for step in steps)
        self._parts = []
        for one, tuning in ((True, decode), (False, prefill)):
            mine = [step for step in steps if (step.count == 1) is one]
            if mine:
                self._parts.append((launcher, mine, tuning, one))
        self._data: dict[tuple[int, int], StepData] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        for index, (launcher, steps, tuning, one) in enumerate(self._parts):
            queries = tuning.queries(q.shape[1] // k.shape[1])
            if (index, queries) not in self._data:
                self._data[index, queries] = StepData.of(launcher.layout, steps, queries, launcher.device)
            data = self._data[index, queries]
            most = max(step.count for step in steps)
            launcher.run(layer, data, q, k, v, out, lse, scale=self._scale, tuning=tuning, decode=one, most=most)
        return out, lse
