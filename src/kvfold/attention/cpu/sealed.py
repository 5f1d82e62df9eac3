"""Plans for sequences whose tokens are near or far by their position."""

import ctypes
from collections.abc import Sequence
from ctypes import c_void_p

from torch import Tensor

from kvfold.attention.base import SequenceStep
from kvfold.attention.cpu.calls import SealedCall, SealedTables, Step, native_format, rounded_by_reference, supported
from kvfold.attention.cpu.layer import fill_layer, fill_steps, layer_call, run_layer
from kvfold.kv.layout import CacheLayout
from kvfold.kv.pool import PagePool
from kvfold.kv.tables import PageTables
from kvfold.native.library import library


class SealedFormats:
    """A layout's formats as the kernels keep them."""

    def __init__(self, layout: CacheLayout) -> None:
        self.near = native_format(layout.near)
        self.far = [(c_void_p * layout.kv_heads)(*map(native_format, layer)) for layer in layout.far]
        self.rounded_by_reference = any(map(rounded_by_reference, layout.far))

    @classmethod
    def of(cls, layout: CacheLayout) -> "SealedFormats | None":
        """None where the kernels do not know one of them."""
        every = {layout.near, *(fmt for layer in layout.far for fmt in layer)}
        return cls(layout) if all(map(supported, every)) else None


class CpuSealedPlan:
    """Implements `Plan` for a `CacheLayout`."""

    def __init__(
        self,
        pool: PagePool,
        layout: CacheLayout,
        formats: SealedFormats,
        steps: Sequence[SequenceStep[PageTables]],
        scale: float,
        kernels: int,
    ) -> None:
        self._layout, self._formats = layout, formats
        self._tables = (SealedTables * len(steps))()
        self._infos = (Step * len(steps))()
        self.refill(steps)
        self._call = SealedCall(
            layer=layer_call(pool, layout.kv_heads, self._infos, scale, kernels),
            exact=layout.exact,
            sinks=layout.sinks,
            recent=layout.recent,
            seal=layout.seal,
            ring=max(layout.ring, 1),
            near_format=formats.near,
            tables=ctypes.cast(self._tables, c_void_p),
        )

    def refill(self, steps: Sequence[SequenceStep[PageTables]]) -> None:
        """Turns to other steps, as many as before: every call that was made from this plan is of them from now on."""
        fill_steps(self._infos, steps)
        # The arrays behind the pointers must live as long as they are in use.
        self._arrays = [(s.tables.near, s.tables.far) for s in steps]
        for entry, (near, far) in zip(self._tables, self._arrays, strict=True):
            entry.near, entry.far = near.ctypes.data, far.ctypes.data
            entry.near_columns, entry.far_columns = near.shape[1], far.shape[1]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        call = self._layer_call(layer)
        window = self._layout.windows[layer]
        return run_layer(call.layer, layer, window, q, k, v, lambda: library().kvfold_attend_sealed(ctypes.byref(call)))

    def call(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> SealedCall:
        """What the kernels are to compute; tensors and plan must outlive it. Tensors as in `fill_layer`."""
        call = self._layer_call(layer)
        fill_layer(call.layer, layer, self._layout.windows[layer], q, k, v, out, lse)
        return call

    def _layer_call(self, layer: int) -> SealedCall:
        call = SealedCall.from_buffer_copy(self._call)
        call.sunk = self._layout.keeps_sinks(layer)
        call.far_formats = ctypes.cast(self._formats.far[layer], c_void_p)
        return call
