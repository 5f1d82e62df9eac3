"""The backend `cpu`: plans that hand whole layers to the compiled kernels."""

import ctypes
from collections.abc import Sequence
from ctypes import c_void_p
from typing import Any

import torch
from torch import Tensor

from kvfold.attention.base import Plan, SequenceStep
from kvfold.attention.cpu.calls import LayerCall, StepInfo, native_format, supported
from kvfold.attention.reference import ReferenceBackend
from kvfold.kv.layout import CacheLayout
from kvfold.kv.pool import PagePool
from kvfold.kv.staged import StagedLayout
from kvfold.kv.tables import PageTables
from kvfold.native.library import find_kernels, kernels_name, library


class CpuBackend:
    """Implements `AttentionBackend` with the kernels for this machine's instructions.

    kernels: name of the instructions to be used (`avx512-vnni-bf16`, `avx512-vnni`, `avx2`, `portable`); None: the best
    there are. What the kernels do not know (staged layouts, formats with sums of codes) goes to the reference.
    Raises KernelsUnavailable where the kernels were not built or the machine lacks the instructions.
    """

    def __init__(self, kernels: str | None = None) -> None:
        self._kernels = find_kernels(kernels)
        self._reference = ReferenceBackend()
        self._formats: dict[int, tuple[CacheLayout, _Formats | None]] = {}  # by identity: hashing would take longer

    @property
    def name(self) -> str:
        """The instructions in use."""
        return kernels_name(self._kernels)

    def plan(
        self, pool: PagePool, layout: CacheLayout | StagedLayout, steps: Sequence[SequenceStep[Any]], scale: float
    ) -> Plan:
        if isinstance(layout, CacheLayout) and pool.data.device.type == "cpu":
            formats = self._formats_of(layout)
            if formats is not None:
                return CpuPlan(pool, layout, formats, steps, scale, self._kernels)
        return self._reference.plan(pool, layout, steps, scale)

    def _formats_of(self, layout: CacheLayout) -> "_Formats | None":
        if id(layout) not in self._formats:
            every = {layout.near, *(fmt for layer in layout.far for fmt in layer)}
            self._formats[id(layout)] = layout, _Formats(layout) if all(map(supported, every)) else None
        return self._formats[id(layout)][1]


class _Formats:
    """A layout's formats as the kernels keep them."""

    def __init__(self, layout: CacheLayout) -> None:
        self.near = native_format(layout.near)
        self.far = [(c_void_p * layout.kv_heads)(*map(native_format, layer)) for layer in layout.far]


class CpuPlan:
    """Implements `Plan`."""

    def __init__(
        self,
        pool: PagePool,
        layout: CacheLayout,
        formats: _Formats,
        steps: Sequence[SequenceStep[PageTables]],
        scale: float,
        kernels: int,
    ) -> None:
        self._layout, self._formats = layout, formats
        self._steps = (StepInfo * len(steps))()
        self.refill(steps)
        self._call = LayerCall(
            data=pool.data.data_ptr(),
            page_bytes=pool.page_bytes,
            kv_heads=layout.kv_heads,
            scale=scale,
            exact=layout.exact,
            sinks=layout.sinks,
            recent=layout.recent,
            seal=layout.seal,
            ring=max(layout.ring, 1),
            near_format=formats.near,
            steps=ctypes.cast(self._steps, c_void_p),
            count=len(steps),
            kernels=kernels,
        )

    def refill(self, steps: Sequence[SequenceStep[PageTables]]) -> None:
        """Turns to other steps, as many as before: every call that was made from this plan is of them from now on."""
        # The arrays behind the pointers must live as long as the plan.
        self._tables = [(s.tables.near, s.tables.far) for s in steps]
        for info, step, (near, far) in zip(self._steps, steps, self._tables, strict=True):
            info.near, info.far = near.ctypes.data, far.ctypes.data
            info.near_columns, info.far_columns = near.shape[1], far.shape[1]
            info.length, info.first, info.count = step.tables.length, step.first, step.count

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        dtype = q.dtype
        if dtype not in (torch.bfloat16, torch.float32):
            q, k, v = q.float(), k.float(), v.float()
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out = torch.empty(q.shape, dtype=q.dtype)
        lse = torch.empty(q.shape[:2], dtype=torch.float32)
        library().kvfold_attend(ctypes.byref(self.call(layer, q, k, v, out, lse)))
        return out.to(dtype), lse

    def call(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> LayerCall:
        """What the kernels are to compute; tensors and plan must outlive it. q, k, v: the last dimension dense."""
        call = LayerCall.from_buffer_copy(self._call)
        call.layer, call.group, call.dim, call.wide = (
            layer,
            q.shape[1] // k.shape[1],
            q.shape[2],
            q.dtype == torch.float32,
        )
        call.q, call.k, call.v = q.data_ptr(), k.data_ptr(), v.data_ptr()
        call.q_token, call.q_head = q.stride()[:2]
        call.k_token, call.k_head = k.stride()[:2]
        call.v_token, call.v_head = v.stride()[:2]
        call.out, call.lse = out.data_ptr(), lse.data_ptr()
        call.window = self._layout.windows[layer] or 0
        call.sunk = self._layout.keeps_sinks(layer)
        call.far_formats = ctypes.cast(self._formats.far[layer], c_void_p)
        return call
