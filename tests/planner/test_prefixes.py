"""Prompts that share blocks: the simulated prefix cache against the engine's, its pages, and the router's choice."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.benchmark.trace import TraceRequest
from kvfold.cluster import members
from kvfold.model.loading import LoadedModel, load_model
from kvfold.planner.document import EngineLimits
from kvfold.planner.memory import Held, SimMemory
from kvfold.planner.placement import Placement
from kvfold.planner.prefix import PromptName, name_prompts
from kvfold.planner.simulator import simulate
from kvfold.planner.workload import load_requests

from .build import layout_of, method_profile
from .test_same_schedule import make_engine, run_engine, run_simulator

BLOCK = 24
blocks = st.lists(st.integers(0, 2), min_size=1, max_size=7)
shapes = st.lists(st.tuples(blocks, st.integers(1, BLOCK), st.integers(1, 40)), min_size=2, max_size=7)
ROOMY = 2**24


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> LoadedModel:
    return load_model(tiny_llama, dtype=torch.float32)


def named(shape: list[tuple[list[int], int, int]]) -> tuple[list[TraceRequest], list[list[int]]]:
    """Requests (blocks, tokens of the last one, outputs), and tokens whose equality is that of the blocks."""
    asked, prompts = [], []
    for ids, last, outputs in shape:
        # A block that is cut is not the whole one.
        own = [*ids[:-1], ids[-1] if last == BLOCK else 10 + BLOCK * ids[-1] + last]
        length = BLOCK * (len(ids) - 1) + last
        asked.append(TraceRequest(0.0, length, outputs, tuple(own), BLOCK))
        prompts.append([(3 + each + 7 * t) % 300 for each in own for t in range(BLOCK)][:length])
    return asked, prompts


def compare(model: LoadedModel, method: str, limits: EngineLimits, kv_memory: int, shape: list[tuple]) -> int:  # type: ignore[type-arg]
    """The engine's hits."""
    asked, prompts = named(shape)
    engine = make_engine(model, method, limits, kv_memory)
    sizes = [(r.input_tokens, r.output_tokens) for r in asked]
    expected, preemptions = run_engine(engine, sizes, prompts)
    found, simulated, _ = run_simulator(engine, limits, sizes, asked)
    assert found == expected
    assert simulated == preemptions
    return engine.scheduler.prefix_hit_tokens


@pytest.mark.parametrize("method", ["none", "kivi(bits=2)"])
@given(shape=shapes, chunk=st.integers(20, 100), most=st.integers(1, 3), block=st.sampled_from([16, 24, 40]))
@settings(max_examples=12)
def test_same_tokens_in_every_step(
    model: LoadedModel, method: str, shape: list[tuple[list[int], int, int]], chunk: int, most: int, block: int
) -> None:
    compare(model, method, EngineLimits(chunk, 100, most, True, block), ROOMY, shape)


@given(shape=shapes, chunk=st.integers(20, 100), most=st.integers(1, 4), percent=st.integers(100, 350))
@settings(max_examples=25)
def test_same_tokens_where_snapshots_are_dropped(
    model: LoadedModel, shape: list[tuple[list[int], int, int]], chunk: int, most: int, percent: int
) -> None:
    """Dense pages are shared exactly as the engine shares them, so that memory runs out at the same time."""
    limits = EngineLimits(chunk, 120, most, True, 16)
    layout = make_engine(model, "none", limits, ROOMY).lanes[0].layout
    longest = max(BLOCK * (len(ids) - 1) + last + outputs for ids, last, outputs in shape)
    pages = layout.most_pages(longest, chunk) * percent // 100
    compare(model, "none", limits, pages * layout.page_bytes, shape)


def test_a_conversation_begins_where_its_last_turn_ended(model: LoadedModel) -> None:
    turns = [([0] * n, BLOCK, 5) for n in (2, 4, 6)]
    limits = EngineLimits(512, 512, 1, True, 512)
    assert compare(model, "none", limits, ROOMY, turns) == 2 * BLOCK + 4 * BLOCK


def test_a_prefix_is_read_once() -> None:
    shared = tuple(range(4))
    asked = [TraceRequest(100.0 * i, 5 * 512, 2, (*shared, 100 + i)) for i in range(3)]
    result = simulate(asked, Placement(mixed=1), method_profile(), EngineLimits(), 2**28)
    assert [r.cached_tokens for r in result.records] == [0, 4 * 512, 4 * 512]
    first, second, _ = (r.ttft or 0 for r in result.records)
    assert second < first / 3
    off = simulate(asked, Placement(mixed=1), method_profile(), EngineLimits(prefix_caching=False), 2**28)
    assert [r.ttft for r in off.records] == pytest.approx([first] * 3)


@pytest.mark.parametrize("placement", [Placement(mixed=2), Placement(prefill=2, decode=1)])
def test_a_prompt_goes_to_who_has_read_its_beginning(placement: Placement) -> None:
    sizes = [(0.0, 1), (0.01, 2), (50.0, 2), (51.0, 1)]
    asked = [TraceRequest(at, 4 * 512, 3, (talk, 10 + talk, 20 + talk, i + 30)) for i, (at, talk) in enumerate(sizes)]
    records = simulate(asked, placement, method_profile(), EngineLimits(), 2**28).records
    assert [r.prefill_worker for r in records] == [0, 1, 1, 0]
    assert [r.cached_tokens for r in records] == [0, 0, 3 * 512, 3 * 512]
    assert EngineLimits().prefix_block == members.PREFIX_BLOCK


@given(
    st.lists(st.tuples(st.floats(0, 5), blocks, st.integers(1, 60)), min_size=1, max_size=12),
    st.sampled_from([Placement(mixed=1), Placement(mixed=2), Placement(prefill=2, decode=2)]),
    st.sampled_from(["none", "kivi(bits=2)"]),
    st.integers(100, 300),
)
@settings(max_examples=60)
def test_no_page_is_lost_or_counted_twice(
    sizes: list[tuple[float, list[int], int]], placement: Placement, method: str, percent: int
) -> None:
    """The simulation itself refuses to end with a page in use once snapshots are dropped."""
    asked = [TraceRequest(at, BLOCK * len(ids), outputs, tuple(ids), BLOCK) for at, ids, outputs in sizes]
    layout, engine = layout_of(method), EngineLimits(40, 80, 4, True, 16)
    pages = max(layout.most_pages(r.input_tokens + r.output_tokens, 40) for r in asked) * percent // 100
    result = simulate(asked, placement, method_profile(method), engine, pages * layout.page_bytes)
    assert result.complete
    assert max(result.peak_pages) <= pages


def test_pages_of_a_snapshot() -> None:
    """Ten pages, two of them of the end: who goes on shares eight, and the end is the snapshot's alone."""
    memory, one = SimMemory(14), Held()
    assert memory.resize(one, 10)
    memory.snapshot(one, 8, (100, 7))
    assert (memory.in_use, memory.busy) == (10, 10)
    assert memory.resize(one, 11)
    assert (memory.in_use, memory.busy) == (13, 11)
    other, length = memory.match(200, lambda n: (n, 7))
    assert (length, other.pages, memory.in_use, memory.busy) == (100, 10, 13, 13)
    assert not memory.resize(other, 13)  # five of its own, where only one is free, and none to be dropped
    assert memory.in_use == 13
    memory.resize(other, 0)
    assert (memory.in_use, memory.busy) == (11, 11)  # the snapshot was dropped for it
    assert memory.match(200, lambda n: (n, 7))[1] == 0
    assert memory.resize(one, 0)
    assert (memory.in_use, memory.busy) == (0, 0)


def test_names_are_equal_where_blocks_are() -> None:
    ids = [(1, 2, 3), (1, 2, 4), (9, 2, 3), ()]
    a, b, c, d = name_prompts([TraceRequest(0.0, 25, 1, each, 10) for each in ids])
    assert a.prefix(20) == b.prefix(20) != a.prefix(19)
    assert a.prefix(21) != b.prefix(21)
    assert a.prefix(10) != c.prefix(10)
    assert d.prefix(5) not in {x.prefix(5) for x in (a, b, c)}
    assert isinstance(d, PromptName)


def test_blocks_shrink_with_lengths(tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 1300, "output_length": 5, "hash_ids": [0, 1, 2]}\n')
    [request], _ = load_requests(trace, 8192, lengths_scale=0.3)
    assert (request.input_tokens, request.hash_ids, request.block_tokens) == (390, (0, 1, 2), 154)
