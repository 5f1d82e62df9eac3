"""The KV memory is a hard limit, is shared fairly, is given back, and is what decides how many requests run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvfold.config.engine import EngineConfig
from kvfold.engine.engine import Engine
from kvfold.engine.lane import build_lane, cache_shape
from kvfold.engine.params import SamplingParams
from kvfold.errors import MemoryLimitError, PromptError
from kvfold.methods.calibrated import flat_statistics
from kvfold.methods.registry import build_method
from kvfold.model.loading import load_model

from .tiny import Tiny, greedy, run, save_tokenizer, tokens

GetTiny = Callable[[str], Tiny]
METHODS = ["none", "zeroc(bits=3,recent=32)"]
with_methods = pytest.mark.parametrize("method", METHODS)


@with_methods
def test_reported_bytes_are_the_pages_held(tiny: GetTiny, method: str) -> None:
    model = tiny("llama")
    engine = model.engine(method, prefix_caching=False)
    engine.add_request(tokens(300, 1), greedy(20))
    pool, heads = engine.memory.pool, 4
    while engine.has_unfinished:
        held = pool.bytes_in_use
        output = engine.step()[0]
        held = pool.bytes_in_use or held  # the last step frees what it held
    assert output.kv.bytes == held + held // pool.page_bytes * 4  # and four bytes of page table each
    assert output.kv.tokens == 319  # the last one is not computed any more
    assert output.kv.bytes == engine.lanes[0].layout.pages(319) * (pool.page_bytes + 4)
    assert output.kv.elements == 319 * heads * 16 * 2
    assert output.kv.dense_bytes == 2 * output.kv.elements
    assert pool.bytes_in_use == 0


@pytest.mark.parametrize(
    ("method", "pages", "chunk"),
    [("none", 37, 1), ("none", 45, 1), ("none", 52, 16), ("zeroc(bits=3,recent=32)", 23, 9)],
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_lone_request_gets_as_far_as_the_memory_reaches(
    tiny: GetTiny, family: str, method: str, pages: int, chunk: int
) -> None:
    """Every length on the way must fit, whatever page ends and windows make of it."""
    engine = tiny(family).engine(method, kv_memory=pages * 2048, chunk=chunk, prefix_block=48)
    output = run(engine, [tokens(40, 1)], greedy(300))[0]
    assert output.outputs[0].finish_reason == "length"
    assert 40 + len(output.outputs[0].token_ids) == engine.memory.longest(0, 340)
    assert output.metrics.preemptions == 0


@with_methods
def test_requests_are_served_in_order_of_arrival(tiny: GetTiny, method: str) -> None:
    model = tiny("llama")
    memory = model.engine(method).lanes[0].layout.pages(260) * 2048 * 5 // 2
    engine = model.engine(method, kv_memory=memory, chunk=40, max_batch_tokens=64)
    order: list[str] = []
    ids = [engine.add_request(tokens(120, seed), greedy(100)) for seed in range(6)]
    most = 0
    while engine.has_unfinished:
        order += [o.request_id for o in engine.step() if o.request_id not in order]
        most = max(most, len(engine.scheduler.running))
        assert engine.memory.pool.bytes_in_use <= memory
    assert order == ids
    assert 1 < most < len(ids)
    assert engine.memory.pool.peak_in_use <= engine.memory.pool.n_pages


@with_methods
def test_a_cancelled_request_leaves_nothing(tiny: GetTiny, method: str) -> None:
    model = tiny("llama")
    memory = model.engine(method).lanes[0].layout.pages(300) * 2048 * 3 // 2
    engine = model.engine(method, kv_memory=memory, prefix_block=64)
    sampling = SamplingParams(max_tokens=100, n=3, seed=1, ignore_eos=True)
    ids = [engine.add_request(tokens(150, seed), sampling) for seed in range(4)]
    for _ in range(20):
        engine.step()
    for request_id in ids:  # some run, some were preempted, some never started
        output = engine.abort(request_id)
        assert output is not None
        assert output.finished
        assert {c.finish_reason for c in output.outputs} == {"abort"}
        engine.check_integrity()
    assert engine.abort(ids[0]) is None
    assert not engine.has_unfinished
    assert engine.step() == []
    engine.memory.prefixes[0].clear()
    assert engine.memory.pool.bytes_in_use == 0


def test_what_can_never_be_served_is_refused_before_any_work(tiny: GetTiny) -> None:
    engine = tiny("llama").engine("none", kv_memory=40 * 2048)
    with pytest.raises(PromptError, match="empty"):
        engine.add_request([], greedy(1))
    with pytest.raises(PromptError, match="639"):
        engine.add_request(tokens(640, 1), greedy(1))
    with pytest.raises(PromptError, match="vocabulary"):
        engine.add_request([3, 128], greedy(1))
    with pytest.raises(MemoryLimitError, match="kv_memory"):
        engine.add_request(tokens(200, 1), greedy(1))
    with pytest.raises(PromptError, match="in use"):
        [engine.add_request([1], greedy(1), request_id="a") for _ in range(2)]
    assert engine.memory.pool.bytes_in_use == 0


class NoAttention:
    """A backend that attends to nothing: for tests of scheduling, where what a model says does not matter."""

    def plan(self, *_: object) -> "NoAttention":
        return self

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(q), q.new_zeros(q.shape[:2])


def test_four_bits_admit_three_and_a_half_times_the_requests_of_dense(tmp_path: Path) -> None:
    """4,096-token prompts, 16-bit windows and page ends included, heads as wide as SmolLM2's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 8192}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    model = load_model(tmp_path, dtype=torch.float32)
    statistics = flat_statistics(cache_shape(model.spec, 16))
    most = {}
    for method in ("none", "zeroc(bits=4)"):
        lane = build_lane(model.decoder, method, build_method(method), 16, statistics)
        memory = 12 * cache_shape(model.spec, 16).dense_bytes(4096 + 64)
        config = EngineConfig(memory, chunk=4096, max_batch_tokens=2**20)
        engine = Engine(model.decoder, model.tokenizer, [lane], config, NoAttention())
        for seed in range(48):
            engine.add_request(tokens(4096, seed), greedy(64))
        most[method] = 0
        for _ in range(32):
            engine.step()
            most[method] = max(most[method], len(engine.scheduler.running))
        assert engine.memory.pool.bytes_in_use <= memory
    assert most["none"] == 12 < most["zeroc(bits=4)"] < 48  # neither is short of requests
    assert most["zeroc(bits=4)"] >= 3.5 * most["none"]
