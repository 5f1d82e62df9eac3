"""The Triton backend: plans of launches for one step."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from kvfold.attention.base import Plan, SequenceStep
from kvfold.attention.reference import ReferenceBackend
from kvfold.attention.triton.descriptors import Descriptors, unsupported
from kvfold.attention.triton.launch import Launcher
from kvfold.attention.triton.step import StepData
from kvfold.attention.triton.tuning import DECODE, PREFILL, Tuning
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
    _launchers: "dict[int, tuple[ref[PagePool], ref[CacheLayout], Launcher]]" = field(default_factory=dict)

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
        launcher = self.launcher(pool, layout)
        parts = []
        for decode, tuning in ((True, self.decode), (False, self.prefill)):
            mine = [step for step in steps if (step.count == 1) is decode]
            if mine:
                parts.append(Part(launcher, mine, tuning, decode))
        return TritonPlan(parts, scale)

    def launcher(self, pool: PagePool, layout: CacheLayout) -> Launcher:
        """What is the same in all steps, made once for a layout and a pool."""
        known = self._launchers.get(id(layout))
        if known is not None and known[0]() is pool and known[1]() is layout:
            return known[2]
        launcher = Launcher(pool, layout, Descriptors(layout, pool.data.device))
        self._launchers[id(layout)] = ref(pool), ref(layout), launcher
        return launcher


class Part:
    """Sequences that are served together: those with one new token, or all others."""

    def __init__(
        self,
        launcher: Launcher,
        steps: Sequence[SequenceStep[Any]],
        tuning: Tuning,
        decode: bool,
        data: StepData | None = None,
    ) -> None:
        """data: what the steps are on the device; None: it is made when it is known how many queries a tile has."""
        self._launcher, self._steps, self._tuning, self._decode, self._data = launcher, steps, tuning, decode, data
        self._most = max((step.count for step in steps), default=1)

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float) -> None:
        if self._data is None:
            queries = self._tuning.queries(q.shape[1] // k.shape[1])
            self._data = StepData.of(self._launcher.layout, self._steps, queries, q.device)
        tuning, decode, most = self._tuning, self._decode, self._most
        self._launcher.run(layer, self._data, q, k, v, out, lse, scale=scale, tuning=tuning, decode=decode, most=most)


class TritonPlan:
    """Implements `Plan`."""

    def __init__(self, parts: Sequence[Part], scale: float) -> None:
        self._parts = parts
        self._scale = scale

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        for part in self._parts:
            part.run(layer, q, k, v, out, lse, self._scale)
        return out, lse
