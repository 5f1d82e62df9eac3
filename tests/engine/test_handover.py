"""Sent pages are local pages: a prompt read by one engine is answered by another as by one alone."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from kvfold.engine.params import SamplingParams
from kvfold.errors import MemoryLimitError, TransferError
from tests.engine.handing import apart, cross, step_until
from tests.engine.tiny import Tiny, generated, greedy, run, tokens

GetTiny = Callable[[str], Tiny]
POSITIONAL = [
    "none", "int8(recent=16)", "int4(recent=16)", "kivi(bits=2,recent=16,group=16)", "zeroc(bits=4,recent=16)",
    "zeroc(rank=8,recent=16)", "hack(bits=2,recent=16,partition=16)", "streaming(window=60)",
    "zeroc(bits=3.5,recent=16)",
]  # fmt: skip
STAGED = [
    "snapkv(budget=60)", "kvcompress(budget=96)", "h2o(budget=60)", "expected(budget=60)", "dbudgetkv(threshold=0.1)",
    'batchmax(policy="h2o",budget=60,chunk=50)+int8(recent=16)', "staged+kivi(bits=4,recent=16,group=16)",
    "snapkv(budget=60)+think(recent=16)", "zipcache(hi=8,lo=4,recent=16,every=32)",
    "adakv(budget=60)+zeroc(bits=6,recent=16)", "zeroc(bits=4,salient_bits=8,recent=16)",
    "keydiff(budget=60)+decoquant(bits=8,recent=16)", "h2o(budget=60)+zeroc(rank=8,recent=16)",
]  # fmt: skip
LENGTHS = (1, 37, 171)


@pytest.mark.parametrize("method", POSITIONAL + STAGED)
def test_the_answer_is_the_one_of_a_single_engine(tiny: GetTiny, method: str) -> None:
    made = tiny("llama")
    alone, source, target = (made.engine(method, chunk=64) for _ in range(3))
    for seed, length in enumerate(LENGTHS):
        prompt = tokens(length, seed)
        expected = run(alone, [prompt], greedy(50))
        assert generated([apart(source, target, prompt, greedy(50))]) == generated(expected), length


@pytest.mark.parametrize("family", ["gemma3", "gpt2"])
@pytest.mark.parametrize("method", ["none", "zeroc(bits=4,recent=16)", "snapkv(budget=60)", "zipcache(recent=16)"])
def test_windows_and_other_families(tiny: GetTiny, family: str, method: str) -> None:
    made = tiny(family)
    alone, source, target = (made.engine(method, chunk=50) for _ in range(3))
    prompt = tokens(150, 5)
    assert generated([apart(source, target, prompt, greedy(40))]) == generated(run(alone, [prompt], greedy(40)))


@pytest.mark.parametrize("method", ["zeroc(bits=4,recent=16)", "h2o(budget=60)"])
def test_several_completions_go_on_with_their_own_draws(tiny: GetTiny, method: str) -> None:
    made = tiny("llama")
    params = SamplingParams(n=3, temperature=1.0, seed=7, max_tokens=20, ignore_eos=True)
    alone, source, target = (made.engine(method) for _ in range(3))
    prompt = tokens(90, 2)
    assert generated([apart(source, target, prompt, params)]) == generated(run(alone, [prompt], params))


def test_a_completion_that_ends_with_its_first_token_stays_ended(tiny: GetTiny) -> None:
    made = tiny("llama")
    prompt = tokens(40, 3)
    draws = run(made.engine("none"), [prompt], SamplingParams(n=3, temperature=1.0, seed=7, max_tokens=1))
    stop = draws[0].outputs[1].token_ids[0]
    params = SamplingParams(n=3, temperature=1.0, seed=7, max_tokens=12, stop_token_ids=[stop], ignore_eos=True)
    [expected] = run(made.engine("none"), [prompt], params)
    result = apart(made.engine("none"), made.engine("none"), prompt, params)
    ended = [o.finish_reason == "handover" for o in result.outputs]
    assert ended[1]
    for gone, found, wanted in zip(ended, result.outputs, expected.outputs, strict=True):
        if not gone:
            assert (found.token_ids, found.finish_reason) == (wanted.token_ids, wanted.finish_reason)


def test_nothing_is_handed_over_when_everything_has_ended(tiny: GetTiny) -> None:
    source = tiny("llama").engine("none")
    output = apart(source, tiny("llama").engine("none"), tokens(40, 3), greedy(1))
    assert output.outputs[0].finish_reason == "length"
    assert not source.handovers.outbox


@pytest.mark.parametrize("method", ["none", "zeroc(bits=4,recent=16)", "h2o(budget=60)"])
def test_tokens_said_elsewhere_are_gone_on_from(tiny: GetTiny, method: str) -> None:
    """Where a cache is lost, prompt and tokens so far are computed again."""
    made = tiny("llama")
    prompt = tokens(120, 4)
    [whole] = run(made.engine(method), [prompt], greedy(40))
    said = whole.outputs[0].token_ids[:17]
    engine = made.engine(method)
    engine.add_request(prompt, greedy(40), request_id="r", outputs=[said])
    assert step_until(engine, "r").outputs[0].token_ids == whole.outputs[0].token_ids
    source, target = made.engine(method), made.engine(method)
    result = None
    source.add_request(prompt, greedy(40), request_id="r", outputs=[said], handover=True)
    step_until(source, "r")
    arrived = cross(source, target, "r")
    assert arrived[1].outputs == [whole.outputs[0].token_ids[:18]]
    target.add_request(prompt, greedy(40), request_id="r", outputs=arrived[1].outputs, arrived=arrived)
    result = step_until(target, "r")
    assert result.outputs[0].token_ids == whole.outputs[0].token_ids


def test_pages_are_held_until_they_are_fetched_and_no_longer(tiny: GetTiny) -> None:
    source = tiny("llama").engine("none", prefix_caching=False)
    source.add_request(tokens(100, 1), greedy(8), request_id="r", handover=True)
    step_until(source, "r")
    held = source.memory.pool.bytes_in_use
    assert held > 0
    outgoing = source.handovers.outbox["r"]
    source.abort("r")
    assert source.memory.pool.bytes_in_use == 0
    with pytest.raises(TransferError, match="cancelled"):
        outgoing.part(0, 0)


def test_a_full_outbox_holds_back_new_prompts_until_it_is_emptied(tiny: GetTiny) -> None:
    probe = tiny("llama").engine("none", prefix_caching=False)
    pages = probe.memory.pages(0, 110)
    engine = tiny("llama").engine("none", kv_memory=pages * probe.memory.pool.page_bytes, prefix_caching=False)
    for name, seed in (("a", 1), ("b", 2)):
        engine.add_request(tokens(100, seed), greedy(8), request_id=name, handover=True)
    step_until(engine, "a")
    for _ in range(3):
        assert engine.step() == []
    assert engine.stalled
    assert list(engine.handovers.outbox) == ["a"]
    preemptions = engine.stats().preemptions
    engine.step()
    assert engine.stats().preemptions == preemptions
    engine.handovers.release("a")
    step_until(engine, "b")
    engine.check_integrity()


def test_a_cache_waits_for_room_and_one_that_never_fits_is_refused(tiny: GetTiny) -> None:
    made = tiny("llama")
    source = made.engine("none")
    for name in "ab":
        source.add_request(tokens(100, 1), greedy(8), request_id=name, handover=True)
        step_until(source, name)
    pages = source.memory.pages(0, 110)
    page_bytes = source.memory.pool.page_bytes
    target = made.engine("none", kv_memory=pages * page_bytes, prefix_caching=False)
    arriving, _ = cross(source, target, "a")
    header = source.handovers.outbox["b"].header
    assert target.handovers.expect(header, 0) is None
    target.handovers.refuse(arriving)
    target.check_integrity()
    assert target.handovers.expect(header, 0) is not None
    small = made.engine("none", kv_memory=pages // 2 * page_bytes)
    with pytest.raises(MemoryLimitError, match="raise kv_memory"):
        small.handovers.expect(header, 0)


def test_another_method_model_or_calibration_is_refused(tiny: GetTiny) -> None:
    source = tiny("llama").engine("zeroc(bits=4,recent=16)")
    source.add_request(tokens(50, 1), greedy(8), request_id="r", handover=True)
    step_until(source, "r")
    header = source.handovers.outbox["r"].header
    for other in ("zeroc(bits=3,recent=16)", "zeroc(bits=4,recent=32)", "none"):
        with pytest.raises(TransferError, match="another method"):
            tiny("llama").engine(other).handovers.expect(header, 0)


@pytest.mark.parametrize("method", ["none", "zeroc(bits=4,recent=16)"])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_part_of_another_size_writes_nothing(tiny: GetTiny, method: str, change: int) -> None:
    source, target = (tiny("llama").engine(method) for _ in range(2))
    source.add_request(tokens(90, 1), greedy(8), request_id="r", handover=True)
    step_until(source, "r")
    outgoing = source.handovers.outbox["r"]
    arriving = target.handovers.expect(outgoing.header, 0)
    assert arriving is not None
    before = target.memory.pool.data.clone()
    with pytest.raises(ValueError, match="bytes"):
        arriving.extents.write(target.memory.pool, 0, np.resize(outgoing.part(0, 0), outgoing.part(0, 0).size + change))
    assert torch.equal(target.memory.pool.data, before)
