"""The compiled kernels on staged sequences against the reference: tracks, coordinates, windows and watches."""

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st

from kvfold.attention.base import SequenceStep
from kvfold.attention.cpu.staged import CpuStagedPlan
from kvfold.attention.reference import ReferenceBackend
from kvfold.kv.format import PageFormat, Row, Scale, Segment, raw_format
from kvfold.kv.layout import CacheLayout
from kvfold.kv.pool import PagePool
from kvfold.kv.staged import StagedLayout, Watch
from kvfold.kv.staged_tables import StagedTables
from tests.attention.staged_cases import FRAMES, Case, farthest, taken
from tests.attention.stepping import random_inputs, stepped
from tests.attention.test_cpu import KERNELS, backend, rows

PAGES = 800
# Code widths that fill whole bytes of a block.
WIDTHS = {2: (4, 8), 4: (2, 4, 6, 8), 8: range(1, 9), 16: range(1, 9), 32: range(1, 9)}
WATCHES = (
    Watch(),
    Watch(5),
    Watch(3, probes=0.3, power=2),
    Watch(power=0, renewed=False),
    Watch(0.2, power=0),
)


@st.composite
def sides(draw: st.DrawFn, frame: str, dim: int, block: int, raw_bits: int, kv_heads: int) -> list[Row]:
    """Rows of one side in one kind of coordinates, per head; some kinds need all dimensions, or heads alike."""
    whole = frame in ("scaled", "plain scaled", "factored")
    if block == 1:
        return [Row((Segment(raw_bits, dim if whole else draw(st.integers(1, dim))),))] * kv_heads
    if whole or block < 16:
        scales, widths = st.sampled_from(list(Scale)), st.sampled_from(WIDTHS[block])
        return [Row((Segment(draw(widths), dim),), draw(scales)) for _ in range(kv_heads)]
    return [draw(rows(dim, block, list(Scale), raw_bits)) for _ in range(kv_heads)]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dim = draw(st.sampled_from([32, 40, 64, 80, 128, 256]))
    raw_bits = draw(st.sampled_from([16, 16, 32]))
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    windows = draw(st.sampled_from([(None,), (None,), (9, None), (40,)]))
    page = 160 * dim  # holds one block of the widest codes
    coded, frames = [], []
    for _ in range(draw(st.integers(0, 3))):
        frame = (draw(st.sampled_from(FRAMES)), draw(st.sampled_from(FRAMES)))
        frames.append(frame)
        block = 1 if "selected" in frame else draw(st.sampled_from([16, 16, 32, 2, 4, 8]))
        kinds = [draw(sides(kind, dim, block, raw_bits, kv_heads)) for kind in frame]
        coded.append(tuple(PageFormat(page, dim, block, key, value) for key, value in zip(*kinds, strict=True)))
    shares = (1 / max(len(coded), 1),) * len(coded)
    layout = StagedLayout(
        raw_format(page, dim, raw_bits),
        windows,
        kv_heads,
        tuple((track,) * len(windows) for track in coded),
        shares,
        watches=draw(st.sampled_from([(), WATCHES[:1], WATCHES])),
    )
    held = tuple(draw(st.lists(st.integers(0, 140), min_size=1, max_size=3)))
    counts = tuple(draw(st.sampled_from([1, 1, 2, 11])) for _ in held)
    dtype = torch.bfloat16 if raw_bits == 16 and draw(st.booleans()) else torch.float32
    group = draw(st.sampled_from([1, 2, 3, 7, 8, 12]))
    return Case(layout, tuple(frames), held, counts, group, draw(st.integers(0, 99)), dtype)


def compare(kernels: str, case: Case, pages: int = PAGES) -> None:
    fast = backend(kernels)
    found, expected = taken(fast, case, pages), taken(ReferenceBackend(), case, pages)
    assert torch.equal(found.data, expected.data)
    integer = "vnni" in kernels  # queries are rounded to 14 bits, weights to 16
    for out, expected_out in zip(found.out, expected.out, strict=True):
        spread = max(float(expected_out.float().pow(2).mean().sqrt()), 1e-3)
        wrong = (out.float() - expected_out.float()) / spread
        assert float(wrong.pow(2).mean().sqrt()) < (0.02 if integer else 0.01)
        assert float(wrong.abs().max()) < (0.3 if integer else 0.05)
    assert farthest(found.lse, expected.lse) < (0.1 if integer else 2e-4)
    for mass, expected_mass in zip(found.mass, expected.mass, strict=True):
        for watch, tracks in expected_mass.items():
            for received, expected_received in zip(mass[watch], tracks, strict=True):
                close = (0.1, 0.05) if integer else (2e-3, 1e-3)
                torch.testing.assert_close(received, expected_received, rtol=close[0], atol=close[1])


@pytest.mark.parametrize("kernels", KERNELS)
@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_staged_kernels_agree_with_the_reference(kernels: str, case: Case) -> None:
    note(str(case))
    compare(kernels, case)


def long_case(counts: tuple[int, ...], watches: tuple[Watch, ...] = WATCHES) -> Case:
    """Sequences that are cut into parts, several pieces of received attention among them."""
    fmt = PageFormat(8192, 64, 16, Row((Segment(4, 64),)), Row((Segment(4, 64),), Scale.STEP))
    layout = StagedLayout(raw_format(8192, 64), (None,), 2, (((fmt,) * 2,),), (1.0,), watches=watches)
    return Case(layout, (("scaled", "scaled"),), (5000,) * len(counts), counts, 3, 7)


@pytest.mark.parametrize("kernels", KERNELS)
def test_long_sequences(kernels: str) -> None:
    compare(kernels, long_case((1, 5)), 2000)


def test_the_number_of_threads_changes_nothing_but_rounding() -> None:
    fast, before = backend("portable"), torch.get_num_threads()
    found = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        found.append(taken(fast, long_case((1, 5)), 2000))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert farthest(other.out + other.lse, found[0].out + found[0].lse) < 1e-5
        for mass, expected in zip(other.mass, found[0].mass, strict=True):
            assert all(farthest(mass[watch], expected[watch]) < 1e-4 for watch in expected)


@pytest.mark.parametrize("kernels", KERNELS)
def test_one_kind_of_cache_leaves_nothing_to_the_other(kernels: str) -> None:
    fast = backend(kernels)
    near = raw_format(8192, 64)
    layout = CacheLayout(((near,),), near, 0, 0, (None,), exact=True)
    inputs = random_inputs([20], 1, 3, 1, 64, 0)
    taken(fast, long_case((1,)), 2000)
    ((out, lse),), ((out_r, lse_r),) = (stepped(b, layout, inputs, [[20]], 0.1)[0] for b in (fast, ReferenceBackend()))
    torch.testing.assert_close(out, out_r, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse, lse_r, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("bits", "block", "dim"), [(4, 2, 64), (2, 4, 40), (8, 1, 64), (1, 8, 128), (3, 8, 64)])
def test_small_blocks(kernels: str, bits: int, block: int, dim: int) -> None:
    """As ZipCache has them: blocks of the fewest tokens that fill whole bytes, over several pages."""
    page = 8192
    fmt = PageFormat(page, dim, block, Row((Segment(bits, dim),)), Row((Segment(bits, dim),), Scale.STEP))
    layout = StagedLayout(raw_format(page, dim), (None,), 2, (((fmt,) * 2,),), (1.0,), watches=WATCHES)
    compare(kernels, Case(layout, (("scaled", "scaled"),), (700, 301), (1, 5), 3, 5))


def planned(kernels: str, layout: StagedLayout, count: int) -> bool:
    """Whether the kernels serve a step of `count` tokens."""
    pool = PagePool(20, layout.page_bytes)
    tables = StagedTables(layout, context=100)
    tables.reserve(pool, count)
    return isinstance(backend(kernels).plan(pool, layout, [SequenceStep(tables, 0, count)], 1.0), CpuStagedPlan)


def test_what_the_kernels_do_not_know_goes_to_the_reference() -> None:
    row = Row((Segment(4, 64),), Scale.TOKEN)
    known = long_case((1,)).layout
    odd = PageFormat(8192, 64, 12, row, row)
    assert planned("portable", known, 1)
    assert not planned("portable", StagedLayout(known.raw, (None,), 2, (((odd,) * 2,),), (1.0,)), 1)


def test_long_pieces_go_to_torch_where_the_kernels_are_slower() -> None:
    layout = long_case((1,)).layout
    assert planned("portable", layout, 64)
    assert not planned("portable", layout, 65)
    assert planned("avx512-vnni", layout, 90)
