"""Layers that leave while later ones are computed: what is left to wait for when the prompt is read, by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.kv.layout import CacheLayout
from kvfold.kv.pool import PagePool
from kvfold.kv.staged import StagedLayout
from kvfold.kv.tables import PageTables
from kvfold.kv.wire import FRAME_BYTES
from kvfold.methods.base import CacheShape
from kvfold.methods.registry import build_method
from kvfold.planner.document import EngineLimits, MethodProfile
from kvfold.planner.latency import DecodeCost, LatencyModel, PrefillCost, TransferCost
from kvfold.planner.pages import PageArithmetic
from kvfold.planner.placement import Link, Placement
from kvfold.planner.records import RequestRecord
from kvfold.planner.simulator import simulate

from .build import FREE, requests

LAYERS = 5
STEP = 0.8
LATENCY = LatencyModel(PrefillCost(STEP, 0.0, 0.0), DecodeCost(0.01, 0.0, 0.0))
ONE_EACH = Placement(prefill=1, decode=1)


def profile_of(
    method: str, windows: tuple[int | None, ...] = (None,) * LAYERS, transfer: TransferCost = FREE
) -> MethodProfile:
    shape = CacheShape(len(windows), 4, 2, 16, windows, None, 16, (None,) * len(windows))
    layout = build_method(method).prepare(shape, None).layout
    assert isinstance(layout, CacheLayout)
    return MethodProfile(method, LATENCY, transfer, layout, None)


def waited(link: Link, prompt: int = 300, method: str = "none", chunk: int = 512) -> tuple[float, float]:
    """Seconds from the first token to the end of the pull, and those that the bytes alone take."""
    limits = EngineLimits(chunk=chunk, prefix_caching=False)
    record = simulate(requests((0.0, prompt, 9)), ONE_EACH, profile_of(method), limits, 2**26, link).records[0]
    return late(record), 8 * record.wire_bytes / (link.gbps * 1e9)


def late(record: RequestRecord) -> float:
    assert record.handed is not None
    assert record.pulled is not None
    return record.pulled - record.handed


@pytest.mark.parametrize("method", ["none", "int8(recent=16)", "kivi(bits=2)"])
@pytest.mark.parametrize("windows", [(None, None), (None, 70)])
@given(length=st.integers(1, 700))
@settings(max_examples=15)
def test_parts_are_what_the_wire_carries(method: str, windows: tuple[int | None, ...], length: int) -> None:
    layout = profile_of(method, windows).sealed
    assert layout is not None
    tables, pool = PageTables(layout), PagePool(layout.pages(length), layout.page_bytes)
    tables.take(pool, length)
    extents = tables.extents(length)
    assert PageArithmetic(layout, 512).parts(length, length) == tuple(
        len(extents.read(pool, layer)) + FRAME_BYTES for layer in range(extents.layers)
    )


@pytest.mark.parametrize("method", ["none", "kivi(bits=2)"])
@pytest.mark.parametrize("chunk", [512, 128])
def test_of_a_fast_link_the_last_layer_shows(method: str, chunk: int) -> None:
    wait, sending = waited(Link(10.0), method=method, chunk=chunk)
    assert sending / LAYERS < STEP / LAYERS
    assert wait == pytest.approx(sending / LAYERS)


def test_of_a_slow_link_all_but_the_overlap_shows() -> None:
    """It is busy from the first layer's end on: four fifths of the step are hidden."""
    wait, sending = waited(Link(1e-3))
    assert sending / LAYERS > STEP / LAYERS
    assert wait == pytest.approx(sending - STEP * (LAYERS - 1) / LAYERS)


def test_only_the_last_chunk_hides_anything() -> None:
    whole, sending = waited(Link(1e-3), chunk=512)
    chunked, same = waited(Link(1e-3), chunk=100)
    assert (whole, sending) == (pytest.approx(chunked), same)


def test_what_a_handover_costs_beside_its_bytes_is_never_hidden() -> None:
    assert waited(Link(10.0, overhead=0.25))[0] == pytest.approx(0.25 + waited(Link(10.0))[0])
    slow = profile_of("none", transfer=TransferCost(0.1, 1e5))
    record = simulate(requests((0.0, 300, 9)), ONE_EACH, slow, EngineLimits(), 2**26, Link(1e9)).records[0]
    assert late(record) == pytest.approx(0.1 + record.wire_bytes / 1e5 - STEP * (LAYERS - 1) / LAYERS, rel=1e-4)


def test_a_pull_that_has_to_wait_for_memory_hides_nothing() -> None:
    """The decode side holds one sequence at a time: the second is pulled, and its pages held, when the first ends."""
    method, link = profile_of("none"), Link(1e-2)
    layout = method.layout
    memory = layout.pages(310) * layout.page_bytes * 3 // 2
    asked = requests((0.0, 300, 200), (1.0, 200, 60), (1.1, 300, 2))
    first, second, third = simulate(asked, ONE_EACH, method, EngineLimits(), memory, link).records
    assert first.last is not None
    assert second.handed is not None
    assert second.handed < first.last
    assert late(second) >= first.last - second.handed + 8 * second.wire_bytes / 1e7 - 1e-9
    # Prompts behind it wait for the pages that it still holds.
    assert third.first is not None
    assert second.pulled is not None
    assert third.first >= second.pulled + STEP


def test_caches_that_leave_together_share_the_line() -> None:
    """Three at once, all read in one step: none is there before nearly all bytes are."""
    method, link = profile_of("none"), Link(1e-3)
    records = simulate(requests(*[(0.0, 300, 9)] * 3), ONE_EACH, method, EngineLimits(), 2**26, link).records
    ends = [late(record) for record in records]
    alone = 8 * records[0].wire_bytes / 1e6
    assert max(ends) == pytest.approx(3 * alone - STEP * (LAYERS - 1) / LAYERS)
    assert min(ends) > max(ends) - 3 * alone / LAYERS


def test_staged_caches_leave_when_the_prompt_is_compressed() -> None:
    shape = CacheShape(LAYERS, 4, 2, 16, (None,) * LAYERS, None, 16, (None,) * LAYERS)
    layout = build_method("snapkv(budget=48)").prepare(shape, None).layout
    assert isinstance(layout, StagedLayout)
    method = MethodProfile("snapkv(budget=48)", LATENCY, FREE, None, layout)
    record = simulate(requests((0.0, 300, 9)), ONE_EACH, method, EngineLimits(), 2**26, Link(1e-3)).records[0]
    assert late(record) == pytest.approx(8 * record.wire_bytes / 1e6)
