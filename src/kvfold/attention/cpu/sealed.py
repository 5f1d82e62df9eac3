"""Plans for sequences whose tokens are near or far by their position."""

import ctypes
from collections.abc import Sequence
from ctypes import c_void_p

from torch import Tensor

from kvfold.attention.base import SequenceStep
from kvfold.attention.cpu.calls import SealedCall, SealedTables, native_format, supported
from kvfold.attention.cpu.layer import layer_call, run_layer, step_infos
from kvfold.kv.layout import CacheLayout
from kvfold.kv.pool import PagePool
from kvfold.kv.tables import PageTables
from kvfold.native.library import library


class SealedFormats:
    """A layout's formats as the kernels keep them."""

    def __init__(self, layout: CacheLayout) -> None:
        self.near = native_format(layout.near)
        self.far = [(c_void_p * layout.kv_heads)(*map(native_format, layer)) for layer in layout.far]

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
        # The arrays behind the pointers must live as long as the plan.
        arrays = [(s.tables.near, s.tables.far) for s in steps]
        tables = (SealedTables * len(steps))(
            *(SealedTables(near.ctypes.data, far.ctypes.data, near.shape[1], far.shape[1]) for near, far in arrays)
        )
        infos = step_infos(steps)
        self._alive = arrays, tables, infos
        self._call = SealedCall(
            layer=layer_call(pool, layout.kv_heads, infos, scale, kernels),
            exact=layout.exact,
            sinks=layout.sinks,
            recent=layout.recent,
            seal=layout.seal,
            ring=max(layout.ring, 1),
            near_format=formats.near,
            tables=ctypes.cast(tables, c_void_p),
        )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        call = self._call
        call.sunk = self._layout.keeps_sinks(layer)
        call.far_formats = ctypes.cast(self._formats.far[layer], c_void_p)
        window = self._layout.windows[layer]
        return run_layer(call.layer, layer, window, q, k, v, lambda: library().kvfold_attend_sealed(ctypes.byref(call)))
