"""What a policy promises: bytes given back, protected tokens kept, and no growth however long the answer."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvfold.attention.staged import StagedPlan
from kvfold.kv.staged import StagedLayout
from kvfold.kv.staged_tables import StagedTables
from kvfold.methods.held import HeldRows
from kvfold.methods.policy import Policy
from tests.engine.tiny import Tiny, greedy, run, tokens

GetTiny = Callable[[str], Tiny]
EVERY = 32
BUDGETED = [
    "snapkv(budget=64)", "pyramidkv(budget=64)", "adakv(budget=64)", "kvcompress(budget=96)", "h2o(budget=64)",
    "tova(budget=64)", "expected(budget=64)", "keydiff(budget=64)", "ems(budget=64)",
    'batchmax(policy="adakv",budget=64,chunk=48)', 'batchmax(policy="kvcompress",budget=96,chunk=48)',
]  # fmt: skip
CODED = ["snapkv(budget=64)+kivi(recent=16,group=16)", "h2o(budget=64)+zeroc(bits=3,recent=16)",
         "adakv(budget=64)+zipcache(recent=16,every=32)"]  # fmt: skip
FREE = ["dbudgetkv(threshold=0.3)", "dbudgetkv(threshold=0.3,rank=attention)"]


def budget_of(method: str) -> int:
    return 96 if "96" in method else 64


def lay(engine_layout: object) -> StagedLayout:
    assert isinstance(engine_layout, StagedLayout)
    return engine_layout


class Guessing(StagedPlan):
    """Stores keys and values, but looks at nothing: attention is made up. What is tested here is how much is held."""

    def _attend(self, group: Any, layer: int, q: Tensor, new_k: Tensor, new_v: Tensor) -> tuple[Tensor, Tensor]:
        heads = slice(layer * new_k.shape[1], (layer + 1) * new_k.shape[1])
        for step in group.steps:
            for tracks in step.tables.mass.values():
                for mass in tracks:
                    mass[heads] += torch.rand(mass[heads].shape) ** 4
        return q, q.new_zeros(q.shape[:3])


class Backend:
    def plan(self, *arguments: Any) -> Guessing:
        return Guessing(*arguments)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_five_hundred_tokens_past_the_budget_take_no_more(tiny: GetTiny, family: str) -> None:
    """All methods beside each other, one request each: tokens, pages and what is kept beside them stay bounded."""
    methods = [*BUDGETED, *CODED] if family == "llama" else [BUDGETED[2], CODED[1]]
    engine = tiny(family).engine(*methods, prefix_caching=False)
    engine._runner._backend = Backend()
    layouts = [lay(lane.layout) for lane in engine.lanes]
    most: dict[int, list[int]] = {lane: [] for lane in range(len(methods))}

    def check() -> None:
        assert engine.memory.pool.bytes_in_use == sum(
            len(s.held.pages()) * engine.memory.pool.page_bytes for s in engine.scheduler.running
        )
        for sequence in engine.scheduler.running:
            tables, lane = sequence.held, sequence.request.lane
            assert isinstance(tables, StagedTables)
            budget, layout = budget_of(methods[lane]), layouts[lane]
            full = layout.windowed == 0
            if tables.length >= 110:
                waiting = tables.length - tables.settled
                assert waiting < EVERY
                assert tables.rows[:, full].sum() <= int(full.sum()) * (budget + waiting)
                assert (tables.rows[0, ~full] <= layout.windowed[~full] + waiting).all()
                ideal = tables.rows / layout.capacity
                held = (tables.pages_of >= 0).sum(-1)
                assert (held <= np.ceil(ideal)).all()  # within one page of each track of each head
                most[lane].append(tables.nbytes)

    run(engine, [tokens(110, 1)] * len(methods), greedy(525), lanes=range(len(methods)), each_step=check)
    engine.check_integrity()
    assert engine.memory.pool.bytes_in_use == 0
    for lane, sizes in most.items():
        assert max(sizes[:100]) * 1.1 >= max(sizes), methods[lane]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("method", ["snapkv(budget=64)", "adakv(budget=64)", "kvcompress(budget=96)", "h2o(budget=64)"])
def test_an_event_gives_back_the_pages_of_what_it_drops(tiny: GetTiny, family: str, method: str) -> None:
    """To within one page of each head: 300 tokens shrink to the budget, whatever the heads' shares are."""
    engine = tiny(family).engine(method, prefix_caching=False, chunk=512)
    layout = lay(engine.lanes[0].layout)
    engine.add_request(tokens(300, 2), greedy(3))
    engine.step()
    capacity, full = layout.raw.capacity, int((layout.windowed == 0).sum())
    windowed = sum(-(-int(w) // capacity) for w in layout.windowed if w)
    pages = engine.memory.pool.bytes_in_use // engine.memory.pool.page_bytes
    ideal = full * budget_of(method) / capacity
    assert ideal + windowed - full <= pages <= ideal + windowed + full
    assert engine.dropped_tokens > 0


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("method", [*BUDGETED, *FREE, *CODED[:1]])
def test_protected_tokens_stay(tiny: GetTiny, monkeypatch: pytest.MonkeyPatch, family: str, method: str) -> None:
    """The first sinks and the newest recent tokens are held after every event, and heads keep what the budget says."""
    events = 0
    import kvfold.methods.staging as staging

    choose = staging.choose

    def watched(policy: Policy, held: HeldRows, layout: StagedLayout) -> tuple[Tensor, Tensor]:
        nonlocal events
        events += 1
        keep, scores = choose(policy, held, layout)
        always = held.first(policy.sinks) | held.newest(policy.recent)
        assert bool(keep[always].all())
        budget = layout.keep(held.context)
        if budget is not None:
            assert int(keep.sum()) <= keep.shape[0] * keep.shape[1] * budget
            # And no less, where there is more: a page of each head may remain where whole pages are dropped.
            if int(held.counts.min()) >= budget and not layout.coded:
                slack = 32 * keep[..., 0].numel() if "kvcompress" in method else 0
                assert int(keep.sum()) >= keep.shape[0] * keep.shape[1] * budget - slack
        return keep, scores

    monkeypatch.setattr(staging, "choose", watched)
    run(tiny(family).engine(method, prefix_caching=False), [tokens(200, 3)], greedy(110))
    assert events >= 4


def test_a_prompt_below_the_budget_loses_nothing(tiny: GetTiny) -> None:
    """Neither tokens nor exactness: attention is the dense cache's until the first token is dropped."""
    methods = [m for m in BUDGETED if "ems" not in m]
    engine = tiny("llama").engine("none", *methods, prefix_caching=False)
    outputs = run(engine, [tokens(30, 6)] * (1 + len(methods)), greedy(30, logprobs=0), lanes=range(1 + len(methods)))
    dense = outputs[0].outputs[0].token_ids
    assert all(output.outputs[0].token_ids == dense for output in outputs)
    assert engine.dropped_tokens == 0


def test_settling_needs_no_page_that_was_not_set_aside(tiny: GetTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the smallest memory that admits a request every event finds the pages it writes to."""
    for method in [*BUDGETED[2:4], BUDGETED[-1], *CODED, "zipcache(recent=16)"]:
        needed = lay(tiny("llama").engine(method).lanes[0].layout).most_pages(151, context=150)
        engine = tiny("llama").engine(method, kv_memory=needed * 2048, prefix_caching=False, chunk=40)
        [output] = run(engine, [tokens(150, 8)], greedy(40), each_step=engine.check_integrity)
        assert output.outputs[0].finish_reason == "length"
        assert len(output.outputs[0].token_ids) == 40 or "zipcache" in method
        assert output.metrics.preemptions == 0
