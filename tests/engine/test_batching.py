"""What a request gets depends on the request alone: not on the batch, preemption, shared prefixes or other lanes."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.engine.engine import Engine
from kvfold.engine.outputs import RequestOutput
from kvfold.engine.params import SamplingParams

from .tiny import Tiny, assert_same_but_for_rounding, generated, greedy, run, tokens

GetTiny = Callable[[str], Tiny]
METHODS = ["none", "zeroc(bits=4,recent=32)"]
PROMPTS = [tokens(length, length) for length in (5, 90, 33, 170)]
with_methods = pytest.mark.parametrize("method", METHODS)
with_families = pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])


def memory_for(engine: Engine, tokens_held: float, lane: int = 0) -> int:
    """Bytes of the pages of a sequence of so many tokens."""
    return engine.lanes[lane].layout.pages(round(tokens_held)) * engine.memory.pool.page_bytes


def logprobs(output: RequestOutput) -> torch.Tensor:
    completion = output.outputs[0]
    return torch.tensor(
        [entry[token].logprob for token, entry in zip(completion.token_ids, completion.logprobs or [], strict=True)]
    )


def assert_same(found: list[RequestOutput], expected: list[RequestOutput]) -> None:
    assert generated(found) == generated(expected)
    for one, other in zip(found, expected, strict=True):
        assert_same_but_for_rounding(logprobs(one), logprobs(other))


def alone(model: Tiny, method: str, params: SamplingParams, prompts: list[list[int]] = PROMPTS) -> list[RequestOutput]:
    """Each prompt in an engine of its own."""
    return [run(model.engine(method), [prompt], params)[0] for prompt in prompts]


@with_methods
@with_families
def test_a_batch_equals_single_requests(tiny: GetTiny, family: str, method: str) -> None:
    params = greedy(40, logprobs=0)
    together = run(tiny(family).engine(method, chunk=50, max_batch_tokens=70), PROMPTS, params)
    assert_same(together, alone(tiny(family), method, params))


@pytest.mark.parametrize("method", ["none", "zeroc(bits=8,recent=16)"])
@with_families
def test_preempted_and_resumed_equals_never_preempted(tiny: GetTiny, family: str, method: str) -> None:
    model, params = tiny(family), greedy(130, logprobs=0)
    prompts = [tokens(100, seed) for seed in range(3)]
    roomy = model.engine(method, chunk=16)
    pages = 2 * roomy.lanes[0].layout.pages(229, 228) - 1  # two sequences do not fit to their ends ...
    assert pages >= 2 * roomy.memory.pages(0, 164)  # ... but as far as admission looks ahead
    engine = model.engine(method, kv_memory=pages * 2048, chunk=16, prefix_caching=False)
    outputs = run(engine, prompts, params, each_step=engine.check_integrity)
    assert sum(output.metrics.preemptions for output in outputs) > 0
    assert engine.memory.pool.bytes_in_use == 0
    assert_same(outputs, run(roomy, prompts, params))


@with_methods
@with_families
def test_a_prefix_hit_equals_a_miss(tiny: GetTiny, family: str, method: str) -> None:
    model, params = tiny(family), greedy(30, logprobs=0)
    shared = tokens(200, 7)
    first, second = shared + tokens(30, 8), shared + tokens(50, 9)
    engine = model.engine(method, prefix_block=64)
    before = run(engine, [first], params)[0]
    again = first + before.outputs[0].token_ids + tokens(20, 10)
    found = run(engine, [second, again], params, each_step=engine.check_integrity)
    assert before.metrics.cached_prompt_tokens == 0
    assert found[0].metrics.cached_prompt_tokens == 192
    assert found[1].metrics.cached_prompt_tokens == len(first) + 29  # the last token of the first was never computed
    assert_same(found, alone(model, method, params, [second, again]))


@with_methods
def test_snapshots_give_way_to_requests(tiny: GetTiny, method: str) -> None:
    """Memory full of prefixes serves a new request as if it were empty."""
    model, params = tiny("llama"), greedy(20, logprobs=0)
    prompts = [tokens(150, seed) for seed in range(6)]
    engine = model.engine(method, kv_memory=memory_for(model.engine(method), 180) * 2, prefix_block=50)
    found = [run(engine, [prompt], params)[0] for prompt in prompts]
    assert len(engine.memory.prefixes[0]) < 4 * len(prompts)
    assert_same(found, run(model.engine(method), prompts, params))


@with_methods
def test_n_completions_of_a_seed_do_not_depend_on_each_other_or_the_batch(tiny: GetTiny, method: str) -> None:
    model = tiny("llama")
    some = SamplingParams(max_tokens=40, temperature=1.0, seed=5, n=3, ignore_eos=True)
    fewer = SamplingParams(max_tokens=40, temperature=1.0, seed=5, n=2, ignore_eos=True)
    one = SamplingParams(max_tokens=40, temperature=1.0, seed=5, ignore_eos=True)
    prompt = PROMPTS[1]
    engine = model.engine(method, chunk=20)
    results = run(
        engine, [PROMPTS[0], prompt, prompt, PROMPTS[2]], [some, some, one, some], each_step=engine.check_integrity
    )
    three = generated(results)[1]
    assert len({tuple(x) for x in three}) == 3
    assert three[:1] == generated(results)[2] == generated(run(model.engine(method), [prompt], one))[0]
    assert three[:2] == generated(run(model.engine(method), [prompt], fewer))[0]
    assert three == generated(run(model.engine(method), [prompt], some))[0]


@with_methods
def test_n_completions_survive_preemption(tiny: GetTiny, method: str) -> None:
    model = tiny("llama")
    params = SamplingParams(max_tokens=110, temperature=1.0, seed=5, n=3, ignore_eos=True)
    kv_memory = memory_for(model.engine(method), 200) * 3 // 2
    engine = model.engine(method, kv_memory=kv_memory)
    output = run(engine, [PROMPTS[1]], params, each_step=engine.check_integrity)[0]
    assert output.metrics.preemptions > 0
    assert generated([output]) == generated(run(model.engine(method), [PROMPTS[1]], params))


@with_families
def test_two_lanes_of_one_engine_equal_two_engines(tiny: GetTiny, family: str) -> None:
    model, params = tiny(family), greedy(30, logprobs=0)
    engine = model.engine(*METHODS, prefix_block=50)
    found = run(engine, PROMPTS, params, lanes=[0, 1, 1, 0], each_step=engine.check_integrity)
    expected = [alone(model, METHODS[lane], params, [PROMPTS[i]])[0] for i, lane in enumerate([0, 1, 1, 0])]
    assert_same(found, expected)
    same_prompt = run(engine, [PROMPTS[3]] * 2, params, lanes=[0, 1])
    assert same_prompt[0].metrics.cached_prompt_tokens > 0
    assert same_prompt[1].metrics.cached_prompt_tokens == 0  # a lane's prefixes are its own


@settings(max_examples=5)
@given(data=st.data())
@with_families
def test_any_traffic_in_little_memory(tiny: GetTiny, family: str, data: st.DataObject) -> None:
    """Requests that come, share prefixes and are cancelled at any time: everyone left gets what it always gets."""
    model = tiny(family)
    method = data.draw(st.sampled_from([*METHODS, "zeroc(bits=2,recent=8,sinks=1)"]))
    probe = model.engine(method)
    # What one sequence may need on its way, which behind a window is more than it holds in the end.
    held = probe.lanes[0].layout.most_pages(200, 512) * probe.memory.pool.page_bytes
    engine = model.engine(
        method,
        kv_memory=held * data.draw(st.sampled_from([2, 3])) // 2,
        chunk=data.draw(st.sampled_from([9, 64, 512])),
        max_batch_tokens=data.draw(st.sampled_from([10, 100, 1000])),
        prefix_block=data.draw(st.sampled_from([16, 50])),
    )
    base = tokens(200, 3)
    ids: dict[str, tuple[list[int], int]] = {}
    done: dict[str, RequestOutput] = {}
    for step in range(3000):
        if len(ids) < 5 and step % 4 == 0:
            prompt = base[: data.draw(st.integers(1, 140))] + tokens(data.draw(st.integers(0, 40)), step)
            count = data.draw(st.integers(1, 30))
            ids[engine.add_request(prompt, greedy(count))] = prompt, count
        if step == 6 and ids and data.draw(st.booleans()):
            victim = data.draw(st.sampled_from(sorted(ids)))
            engine.abort(victim)
            ids[victim] = [], 0
        if len(ids) == 5 and not engine.has_unfinished:
            break
        done |= {output.request_id: output for output in engine.step()}
        engine.check_integrity()
        assert engine.memory.pool.bytes_in_use <= held * 3 // 2
    assert not engine.has_unfinished
    left = {request_id: request for request_id, request in ids.items() if request[0]}
    prompts, params = zip(*((prompt, greedy(count)) for prompt, count in left.values()), strict=True)
    expected = run(model.engine(method), prompts, params)
    assert generated([done[request_id] for request_id in left]) == generated(expected)
