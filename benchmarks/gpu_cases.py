"""Formats, sequences and clocks of `gpu.py`."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.attention.base import SequenceStep
from kvfold.kv.format import PageFormat, Row, Scale, Segment, raw_format
from kvfold.kv.layout import CacheLayout
from kvfold.kv.pool import PagePool
from kvfold.kv.tables import PageTables

SINKS, RECENT, BLOCK = 4, 64, 16


@dataclass(frozen=True)
class Shape:
    """Of one attention layer."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def page_bytes(self) -> int:
        return 32 * 4 * self.head_dim


def layout_of(name: str, shape: Shape, layers: int) -> CacheLayout:
    """name: dense, a number of bits for all dimensions, or mixed, kivi2, int8 (correctness only)."""
    d, page = shape.head_dim, shape.page_bytes
    near = raw_format(page, d)
    if name == "dense":
        return CacheLayout(((near,) * shape.kv_heads,) * layers, near, 0, 0, (None,) * layers, exact=True)
    block = BLOCK
    if name == "mixed":
        widths = [(16, 1), (8, 1), (6, d // 8), (5, d // 8), (4, d // 4), (3, d // 8), (2, d // 8), (1, d // 8 - 2)]
        key = value = Row(tuple(Segment(*w) for w in widths))
    elif name == "kivi2":
        block = 32
        key, value = Row((Segment(2, d),), Scale.CHANNEL), Row((Segment(2, d),), Scale.TOKEN, d // 4)
    elif name == "int8":
        key = value = Row((Segment(8, d),), Scale.TOKEN)
    else:
        key = value = Row((Segment(int(name), d),))
    far = PageFormat(page, d, block, key, value)
    return CacheLayout(((far,) * shape.kv_heads,) * layers, near, SINKS, RECENT, (None,) * layers)


class Held:
    """Sequences of `length` tokens each in a pool of numbers that nobody computed."""

    def __init__(self, layout: CacheLayout, batch: int, length: int, device: torch.device, room: int = 64) -> None:
        pages = batch * layout.most_pages(length + room, length + room)
        self.layout = layout
        self.pool = PagePool(pages, layout.page_bytes, device)
        for part in self.pool.data.split(1 << 16):
            part.view(torch.bfloat16).normal_()
        self.tables = [PageTables(layout) for _ in range(batch)]
        for tables in self.tables:
            tables.reserve(self.pool, length)
            tables.advance(self.pool, length)

    def steps(self) -> list[SequenceStep[PageTables]]:
        """One more token of each sequence."""
        for tables in self.tables:
            tables.reserve(self.pool, tables.length + 1)
        return [SequenceStep(tables, i, 1) for i, tables in enumerate(self.tables)]

    @property
    def nbytes(self) -> float:
        """Bytes of KV rows that attention must read, page ends not counted, of all layers."""
        layout, length = self.layout, self.tables[0].length
        near = 2 * 2 * layout.near.head_dim
        total = 0.0
        for layer in layout.far:
            for fmt in layer:
                far = layout.far_tokens(length)
                total += far * fmt.block_bytes / fmt.block + (length - far) * near
        return total * len(self.tables)


def seconds(run: Callable[[], object], device: torch.device, repetitions: int, warm_up: int = 3) -> list[float]:
    """Times of single runs, in seconds."""
    for _ in range(warm_up):
        run()
    times = []
    for _ in range(repetitions):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1000)
        else:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return times


def replayed(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The same kernels as one CUDA graph, so that no launch is timed; `run` itself on the CPU."""
    if device.type != "cuda":
        return run
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def summary(times: list[float]) -> dict[str, float]:
    """Median, and the spread between the quartiles, in seconds."""
    ordered = sorted(times)
    quarter = len(ordered) // 4
    return {"median_s": statistics.median(ordered), "spread_s": ordered[-1 - quarter] - ordered[quarter]}


def random_rows(tokens: int, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of new tokens."""
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    q, k, v = (torch.randn(tokens, n, shape.head_dim, device=device).to(dtype) for n in heads)
    return q, k, v
