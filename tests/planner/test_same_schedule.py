"""The simulated scheduler against the engine: the same requests, all at once, give the same tokens in every step."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.benchmark.trace import TraceRequest
from kvfold.config.engine import EngineConfig
from kvfold.engine.engine import Engine
from kvfold.engine.lane import build_lane
from kvfold.engine.params import SamplingParams
from kvfold.kv.layout import CacheLayout
from kvfold.methods.registry import build_method
from kvfold.model.loading import LoadedModel, load_model
from kvfold.planner.document import EngineLimits, MethodProfile
from kvfold.planner.placement import Placement
from kvfold.planner.simulator import simulate

from .build import FREE, LATENCY, requests

Steps = list[list[tuple[int, int]]]
Sizes = list[tuple[int, int]]
SEALED = ["none", "kivi(bits=2)"]
sizes = st.lists(st.tuples(st.integers(1, 180), st.integers(1, 90)), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> LoadedModel:
    return load_model(tiny_llama, dtype=torch.float32)


def run_engine(engine: Engine, asked: Sizes, prompts: list[list[int]] | None = None) -> tuple[Steps, int]:
    """Tokens of each request in each step, and preemptions."""
    steps: Steps = []
    schedule = engine.scheduler.schedule

    def recorded() -> list[object]:
        scheduled = schedule()
        steps.append([(int(item.sequence.request.id), item.count) for item in scheduled])
        return list(scheduled)

    engine.scheduler.schedule = recorded  # type: ignore[method-assign, assignment]
    for index, (prompt, outputs) in enumerate(asked):
        # Texts that differ from the first token on: no prefix is shared.
        ids = [(index + 3 + 5 * t) % 300 for t in range(prompt)] if prompts is None else prompts[index]
        params = SamplingParams(temperature=0.0, max_tokens=outputs, ignore_eos=True)
        engine.add_request(ids, params, request_id=str(index))
    while engine.has_unfinished:
        engine.step()
    return [step for step in steps if step], engine.scheduler.preemptions


def run_simulator(
    engine: Engine, limits: EngineLimits, asked: Sizes, known: list[TraceRequest] | None = None
) -> tuple[Steps, int, int]:
    lane, pool = engine.lanes[0], engine.memory.pool
    sealed, staged = (lane.layout, None) if isinstance(lane.layout, CacheLayout) else (None, lane.layout)
    uneven = lane.staging is not None and lane.staging.policy.uneven
    method = MethodProfile(lane.label, LATENCY, FREE, sealed, staged, uneven)
    steps: Steps = []
    result = simulate(
        known or requests(*((0.0, prompt, outputs) for prompt, outputs in asked)),
        Placement(mixed=1),
        method,
        limits,
        pool.n_pages * pool.page_bytes,
        on_step=lambda _, __, step: steps.append([(s.index, count) for s, count in step]),
    )
    return steps, result.preemptions, result.peak_pages[0]


def make_engine(model: LoadedModel, method: str, limits: EngineLimits, kv_memory: int) -> Engine:
    lane = build_lane(model.decoder, method, build_method(method), 32)
    own = (limits.chunk, limits.max_batch_tokens, limits.max_sequences)
    config = EngineConfig(kv_memory, *own, limits.prefix_caching, limits.prefix_block)
    return Engine(model.decoder, model.tokenizer, [lane], config)


@pytest.mark.parametrize("method", SEALED)
@given(asked=sizes, chunk=st.integers(20, 200), batch=st.integers(30, 300), most=st.integers(1, 5), data=st.data())
@settings(max_examples=6)
def test_same_tokens_in_every_step(
    model: LoadedModel, method: str, asked: Sizes, chunk: int, batch: int, most: int, data: st.DataObject
) -> None:
    """Memory from a little more than the longest request alone needs: with it comes preemption."""
    limits = EngineLimits(chunk, batch, most, prefix_caching=False)
    layout = make_engine(model, method, limits, 2**20).lanes[0].layout
    least = max(layout.most_pages(prompt + outputs, chunk) for prompt, outputs in asked)
    pages = data.draw(st.integers(least, 3 * least))
    engine = make_engine(model, method, limits, pages * layout.page_bytes)
    expected, preemptions = run_engine(engine, asked)
    found, simulated, peak = run_simulator(engine, limits, asked)
    assert found == expected
    assert (simulated, peak) == (preemptions, engine.memory.pool.peak_in_use)


@pytest.mark.parametrize("method", SEALED)
def test_preemption_is_simulated(model: LoadedModel, method: str) -> None:
    """Growth beyond what admission looks ahead: the youngest gives way, and computes its tokens again."""
    limits = EngineLimits(16, prefix_caching=False)
    asked = [(100, 130)] * 3
    layout = make_engine(model, method, limits, 2**20).lanes[0].layout
    pages = max(2 * layout.pages(229) - 1, 2 * layout.most_pages(164, 16))
    engine = make_engine(model, method, limits, pages * layout.page_bytes)
    expected, preemptions = run_engine(engine, asked)
    found, simulated, _ = run_simulator(engine, limits, asked)
    assert found == expected
    assert simulated == preemptions
    assert preemptions or method != "none"


@given(asked=sizes, chunk=st.integers(20, 200), batch=st.integers(30, 300), block=st.sampled_from([16, 50, 64]))
@settings(max_examples=6)
def test_chunks_end_where_snapshots_are_taken(
    model: LoadedModel, asked: Sizes, chunk: int, batch: int, block: int
) -> None:
    limits = EngineLimits(chunk, batch, 4, prefix_caching=True, prefix_block=block)
    engine = make_engine(model, "none", limits, 2**24)
    assert run_simulator(engine, limits, asked)[0] == run_engine(engine, asked)[0]


@pytest.mark.parametrize("method", ["snapkv(budget=48)", "h2o(budget=40)", "zipcache", "adakv(budget=48)"])
@given(asked=sizes)
@settings(max_examples=3)
def test_staged_methods_step_from_event_to_event(model: LoadedModel, method: str, asked: Sizes) -> None:
    """What heads hold is bounded, not known; the tokens of steps are the same as long as memory is ample."""
    limits = EngineLimits(60, 150, 4, prefix_caching=False)
    engine = make_engine(model, method, limits, 2**24)
    expected, _ = run_engine(engine, asked)
    found, _, peak = run_simulator(engine, limits, asked)
    assert found == expected
    assert peak == pytest.approx(engine.memory.pool.peak_in_use, rel=0.35, abs=4 * len(asked) + 8)
