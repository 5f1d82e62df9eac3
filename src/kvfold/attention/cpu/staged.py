"""Plans for staged sequences: tracks of pages, coordinates of their own, and watches."""

import ctypes
from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from kvfold.attention.base import SequenceStep
from kvfold.attention.cpu.calls import (
    FrameInfo,
    Numbers,
    StagedCall,
    Step,
    Tracks,
    WatchInfo,
    native_format,
    rounded_by_reference,
    supported,
)
from kvfold.attention.cpu.layer import fill_steps, layer_call, run_layer
from kvfold.attention.staged import record_queries
from kvfold.kv.frame import Frame
from kvfold.kv.pool import PagePool
from kvfold.kv.staged import StagedLayout
from kvfold.kv.staged_tables import StagedTables
from kvfold.native.library import library


class StagedFormats:
    """A layout's formats as the kernels keep them, per layer [tracks][KV heads]."""

    def __init__(self, layout: StagedLayout) -> None:
        count = layout.tracks * layout.kv_heads
        every = [_formats(layout, layer) for layer in range(layout.layers)]
        self.layers = [(c_void_p * count)(*map(native_format, formats)) for formats in every]
        self.rounded_by_reference = any(map(rounded_by_reference, every))

    @classmethod
    def of(cls, layout: StagedLayout) -> "StagedFormats | None":
        """None where the kernels do not know one of them."""
        every = {fmt for layer in range(layout.layers) for fmt in _formats(layout, layer)}
        return cls(layout) if all(map(supported, every)) else None


def _formats(layout: StagedLayout, layer: int) -> list[Any]:
    return [layout.format(track, layer, head) for track in range(layout.tracks) for head in range(layout.kv_heads)]


class CpuStagedPlan:
    """Implements `Plan` for a `StagedLayout`."""

    def __init__(
        self,
        pool: PagePool,
        layout: StagedLayout,
        formats: StagedFormats,
        steps: Sequence[SequenceStep[StagedTables]],
        scale: float,
        kernels: int,
    ) -> None:
        self._layout, self._formats, self._sequences = layout, formats, steps
        # The arrays behind the pointers must live as long as the plan.
        self._alive: list[Any] = []
        infos = (Step * len(steps))()
        fill_steps(infos, steps)
        tables = (Tracks * len(steps))(*(self._tracks(s.tables) for s in steps))
        watches = self._watches(steps)
        self._alive += [infos, tables, watches]
        self._call = StagedCall(
            layer=layer_call(pool, layout.kv_heads, infos, scale, kernels),
            heads=layout.heads,
            tracks=layout.tracks,
            tables=ctypes.cast(tables, c_void_p),
            watches=ctypes.cast(watches, c_void_p),
            watched=len(watches),
        )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        record_queries(self._sequences, layer, q)
        call = self._call
        call.formats = ctypes.cast(self._formats.layers[layer], c_void_p)
        window = self._layout.windows[layer]
        return run_layer(call.layer, layer, window, q, k, v, lambda: library().kvfold_attend_staged(ctypes.byref(call)))

    def _tracks(self, tables: StagedTables) -> Tracks:
        pages, rows = tables.pages_of, tables.rows
        sides = [side for basis in tables.bases for side in ((basis.key, basis.value) if basis else (None, None))]
        frames = (FrameInfo * len(sides))(*map(self._frame, sides))
        self._alive += [pages, rows, frames]
        return Tracks(pages.ctypes.data, rows.ctypes.data, pages.shape[2], ctypes.cast(frames, c_void_p))

    def _frame(self, frame: Frame | None) -> FrameInfo:
        if frame is None:
            return FrameInfo()
        lifting = frame.lifting
        return FrameInfo(*map(self._numbers, (lifting.matrix, lifting.scale, lifting.index, frame.origin)))

    def _numbers(self, numbers: Tensor | None) -> Numbers:
        """numbers: [L, G, ...], G being 1 where all heads share them."""
        if numbers is None:
            return Numbers()
        numbers = numbers.contiguous()
        self._alive.append(numbers)
        layers, heads = numbers.stride()[:2]
        return Numbers(numbers.data_ptr(), layers, heads if numbers.shape[1] > 1 else 0, numbers.dtype == torch.float16)

    def _watches(self, steps: Sequence[SequenceStep[StagedTables]]) -> ctypes.Array[WatchInfo]:
        """What the new queries add to, per sequence and watch that is on any of them."""
        found = []
        for i, step in enumerate(steps):
            tables = step.tables
            for watch, mass in tables.mass.items():
                which = watch.queries(tables.length, step.count, tables.next_event, tables.context)
                queries = which.nonzero()[:, 0]
                if len(queries):
                    pointers = (c_void_p * len(mass))(*(m.data_ptr() for m in mass))
                    widths = (c_int64 * len(mass))(*(m.shape[1] for m in mass))
                    self._alive += [queries, mass, pointers, widths]
                    found.append(
                        WatchInfo(
                            i,
                            watch.power,
                            queries.data_ptr(),
                            len(queries),
                            ctypes.cast(pointers, c_void_p),
                            ctypes.cast(widths, c_void_p),
                        )
                    )
        return (WatchInfo * len(found))(*found)
