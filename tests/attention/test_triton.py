"""The Triton backend against the reference: the same outputs, and the same bytes in every page.

Without a GPU the kernels run in Triton's interpreter, one program after the other: sizes are tiny.
"""

import os
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined

pytest.importorskip("triton")

from kvfold.attention.base import Plan, SequenceStep
from kvfold.attention.reference import ReferenceBackend, ReferencePlan
from kvfold.attention.triton import triton_backend
from kvfold.attention.triton.backend import TritonBackend
from kvfold.attention.triton.graph import DecodeGraphs
from kvfold.attention.triton.tuning import Tuning
from kvfold.errors import ConfigError
from kvfold.kv.format import PageFormat, Row, Scale, Segment, raw_format
from kvfold.kv.layout import CacheLayout
from kvfold.kv.pool import PagePool
from kvfold.kv.tables import PageTables

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter: log(0) and NaN of masked rows

D, PAGE = 16, 2048
BACKEND = TritonBackend(Tuning(keys=32, programs=3), Tuning(rows=64, keys=64))


def row(*segments: tuple[int, int], scale: Scale = Scale.STATIC, group: int | None = None) -> Row:
    return Row(tuple(Segment(*segment) for segment in segments), scale, group)


def page(block: int, key: Row, value: Row, page_bytes: int = PAGE) -> PageFormat:
    return PageFormat(page_bytes, D, block, key, value)


MIXED = row((16, 1), (8, 1), (6, 1), (5, 2), (4, 3), (3, 2), (2, 2), (1, 2))
FORMATS = {
    "planes 4 and 4": [page(16, row((4, D)), row((4, D)))],
    "planes 8 and 3": [page(16, row((8, D)), row((3, D)))],
    "planes 5 and 2": [page(16, row((5, 12)), row((2, 8)))],
    "planes 1 and 7": [page(16, row((1, D)), row((7, D)))],
    "planes 6 and nothing": [page(16, row((6, 12)), Row(()))],
    "mixed": [page(16, MIXED, row((16, 1), (7, 3), (1, 5))), page(16, row((4, D)), MIXED)],
    "token": [page(16, row((8, D), scale=Scale.TOKEN), row((4, 12), scale=Scale.TOKEN, group=6))],
    "bytes": [page(1, row((8, D), scale=Scale.TOKEN), row((8, D), scale=Scale.TOKEN, group=4))],
    "step": [page(16, row((8, 2), (4, 9), scale=Scale.STEP), row((3, D), scale=Scale.STEP))],
    "kivi": [page(32, row((2, D), scale=Scale.CHANNEL), row((2, D), scale=Scale.TOKEN, group=8))],
    "truncated": [page(1, row((16, 11)), row((16, 5)))],
}


def layout_of(kind: str, kv_heads: int, window: int | None = None, sunk: bool = False) -> CacheLayout:
    near = raw_format(PAGE, D)
    if kind == "dense":
        return CacheLayout(((near,) * kv_heads,), near, 0, 0, (window,), exact=True)
    formats = FORMATS[kind]
    far = tuple(formats[head % len(formats)] for head in range(kv_heads))
    return CacheLayout((far,), near, 3, 20, (window,), sunk=(sunk,))


@dataclass
class Cache:
    """One backend with a pool and sequences of its own."""

    backend: TritonBackend | ReferenceBackend
    layout: CacheLayout
    sequences: int

    def __post_init__(self) -> None:
        triton = isinstance(self.backend, TritonBackend)
        self.pool = PagePool(64 * self.sequences, self.layout.page_bytes, DEVICE if triton else "cpu")
        bytes_before = torch.randint(256, self.pool.data.shape, generator=torch.Generator().manual_seed(0))
        self.pool.data.copy_(bytes_before)  # whatever earlier owners left must not matter
        self.tables = [PageTables(self.layout) for _ in range(self.sequences)]

    def step(self, counts: list[int], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        steps, first = [], 0
        for tables, count in zip(self.tables, counts, strict=True):
            if count:
                tables.reserve(self.pool, tables.length + count)
                steps.append(SequenceStep(tables, first, count))
                first += count
        plan = self.backend.plan(self.pool, self.layout, steps, 0.4)
        out, lse = plan.attend(0, *(x.to(self.pool.data.device) for x in (q, k, v)))
        for step in steps:
            step.tables.advance(self.pool, step.tables.length + step.count)
        return out.cpu().float(), lse.cpu()


def compare(
    layout: CacheLayout,
    group: int,
    steps: list[list[int]],
    *,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 2e-5,
    triton_from: int = 0,
) -> None:
    """Runs steps (new tokens of each sequence) through both; the reference works in float32 on the same numbers.
    The steps before `triton_from` are the reference's in both."""
    mine, reference = (Cache(backend, layout, len(steps[0])) for backend in (BACKEND, ReferenceBackend()))
    generator = torch.Generator().manual_seed(len(steps))
    for index, counts in enumerate(steps):
        heads = (layout.kv_heads * group, layout.kv_heads, layout.kv_heads)
        q, k, v = (2 * torch.randn(sum(counts), n, D, generator=generator) for n in heads)
        inputs = [x.to(dtype) for x in (q, k, v)]
        expected = reference.step(counts, *(x.float() for x in inputs))
        if index < triton_from:
            for tables, others in zip(mine.tables, reference.tables, strict=True):
                tables.reserve(mine.pool, others.length)
                tables.advance(mine.pool, others.length)
            mine.pool.data.copy_(reference.pool.data)
            continue
        got = mine.step(counts, *inputs)
        np.testing.assert_allclose(got[1], expected[1], rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(got[0], expected[0], rtol=tolerance, atol=tolerance)
    assert torch.equal(mine.pool.data.cpu(), reference.pool.data)


# Chunks that begin among the sinks, in the window and past it; single tokens that seal; a pause.
STEPS = [[2, 33], [41, 1], [1, 0]]


@pytest.mark.parametrize("kind", ["dense", *FORMATS])
def test_chunks_and_single_tokens(kind: str) -> None:
    compare(layout_of(kind, len(FORMATS.get(kind, [kind]))), 3, STEPS)


@pytest.mark.parametrize(
    ("kind", "window", "sunk"), [("dense", 9, False), ("planes 4 and 4", 9, True), ("mixed", 45, False)]
)
def test_sliding_windows(kind: str, window: int, sunk: bool) -> None:
    compare(layout_of(kind, 1, window, sunk), 1, [[70], [1], [20], [1]], triton_from=1)


@pytest.mark.parametrize(
    ("kind", "group", "kv_heads"), [("planes 4 and 4", 8, 1), ("mixed", 20, 1), ("planes 1 and 7", 1, 3)]
)
def test_groups_of_query_heads(kind: str, group: int, kv_heads: int) -> None:
    compare(layout_of(kind, kv_heads), group, [[90], [1], [7]], triton_from=1)


@pytest.mark.parametrize("kind", ["dense", "planes 4 and 4", "planes 8 and 3", "mixed"])
def test_long_sequences_are_split_and_merged(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKEND, "decode", Tuning(keys=64, programs=5))
    compare(layout_of(kind, 1), 4, [[600], [1]], triton_from=1)


@pytest.mark.parametrize("kind", ["dense", "planes 4 and 4", "planes 8 and 3", "mixed", "kivi"])
def test_bfloat16(kind: str) -> None:
    compare(layout_of(kind, 1), 4, [[100], [1], [5]], dtype=torch.bfloat16, tolerance=2e-2, triton_from=1)


def test_standing_steps_of_graphs() -> None:
    """Batches that shrink and grow, rounded up to a power of 2, in tables that are updated in place."""
    layout = layout_of("planes 4 and 4", 1)
    mine, reference = (Cache(backend, layout, 3) for backend in (BACKEND, ReferenceBackend()))
    generator = torch.Generator().manual_seed(0)

    def inputs(tokens: int) -> list[Tensor]:
        return [torch.randn(tokens, n, D, generator=generator) for n in (2, 1, 1)]

    prompt = inputs(40 + 60 + 9)
    for cache in (mine, reference):
        cache.step([40, 60, 9], *prompt)
    q, k, v = (torch.zeros(4, n, D, device=DEVICE) for n in (2, 1, 1))

    def forward(token_ids: Tensor, positions: Tensor, plan: Plan) -> Tensor:
        rows = slice(0, len(token_ids))
        return plan.attend(0, q[rows], k[rows], v[rows])[0]

    graphs = DecodeGraphs(BACKEND, mine.pool, layout, 0.4, forward)
    for members in ([0, 1, 2], [0, 2], [2], [0, 1, 2], [0, 1, 2]):
        new = inputs(len(members))
        for held, x in zip((q, k, v), new, strict=True):
            held[: len(members)] = x.to(DEVICE)
        expected, _ = reference.step([int(i in members) for i in range(3)], *new)
        steps = []
        for row_index, member in enumerate(members):
            tables = mine.tables[member]
            tables.reserve(mine.pool, tables.length + 1)
            steps.append(SequenceStep(tables, row_index, 1))
        positions = torch.tensor([step.tables.length for step in steps])
        got = graphs.run(steps, torch.zeros_like(positions), positions)
        np.testing.assert_allclose(got.cpu(), expected, rtol=2e-5, atol=2e-5)
        for step in steps:
            step.tables.advance(mine.pool, step.tables.length + 1)
    assert torch.equal(mine.pool.data.cpu(), reference.pool.data)


def test_float32_caches() -> None:
    near = raw_format(PAGE, D, 32)
    exact = CacheLayout(((near,),), near, 0, 0, (None,), exact=True)
    compare(exact, 2, [[10], [1]])
    compare(CacheLayout(((page(16, MIXED, MIXED),),), near, 3, 20, (None,)), 2, [[60], [1], [3]], triton_from=1)
    ranked = page(1, row((32, 9)), row((32, 4)))
    compare(CacheLayout(((ranked,),), near, 3, 20, (None,)), 2, [[60], [1], [3]], triton_from=1)


def test_what_kernels_do_not_know_goes_to_the_reference() -> None:
    summed = page(16, replace(row((4, D), scale=Scale.TOKEN), sums=True), row((4, D)))
    odd = page(8, row((4, D)), row((4, D)))
    near = raw_format(PAGE, D)
    pool = PagePool(4, PAGE)
    for fmt in (summed, odd):
        layout = CacheLayout(((fmt,),), near, 3, 20, (None,))
        plan = BACKEND.plan(pool, layout, [SequenceStep(PageTables(layout), 0, 1)], 1.0)
        assert isinstance(plan, ReferencePlan)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(triton_backend(), TritonBackend)
    monkeypatch.setitem(__import__("sys").modules, "triton", None)
    with pytest.raises(ConfigError, match="install it"):
        triton_backend()
