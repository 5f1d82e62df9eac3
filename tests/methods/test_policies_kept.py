"""Which tokens stay: every policy against its paper in plain loops, step by step, with the attention that follows."""

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from kvfold.config.engine import EngineConfig
from kvfold.engine.engine import Engine
from kvfold.engine.lane import build_lane
from kvfold.kv.staged_tables import StagedTables
from kvfold.methods.registry import build_method
from tests.engine.tiny import Tiny, tokens
from tests.methods import naive_policies as naive
from tests.methods import naive_unequal as unequal
from tests.methods.naive_cache import NaiveCache, Recorder, follow, same_rows

GetTiny = Callable[[str], Tiny]
PROMPT, GENERATED, EVERY = 120, 66, 32


def turns(model: Tiny) -> list[Callable[[int], Tensor] | None]:
    """Per layer RoPE's rotation matrix at a position, from transformers' configuration."""
    config = model.reference.config
    if config.model_type == "gpt2":
        return [None] * config.n_layer
    d = config.head_dim
    angles = 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)

    @lru_cache(maxsize=2048)
    def turn(position: int) -> Tensor:
        matrix = torch.zeros(d, d, dtype=torch.float64)
        for i, angle in enumerate((position * angles).tolist()):
            c, s = torch.tensor(angle).double().cos(), torch.tensor(angle).double().sin()
            a, b = i, i + d // 2
            matrix[a, a], matrix[a, b], matrix[b, a], matrix[b, b] = c, -s, s, c
        return matrix

    return [turn] * config.num_hidden_layers


NAIVE: dict[str, Callable[[Tiny], naive.Naive]] = {
    "snapkv(budget=70)": lambda model: naive.snapkv,
    "pyramidkv(budget=70)": lambda model: naive.pyramidkv,
    "adakv(budget=73)": lambda model: naive.adakv,
    "kvcompress(budget=100,sinks=0)": lambda model: unequal.kvcompress,
    "h2o(budget=61)": lambda model: naive.h2o,
    "tova(budget=0.4)": lambda model: naive.tova,
    "keydiff(budget=70)": lambda model: naive.keydiff,
    "expected(budget=70)": lambda model: naive.expected(turns(model)),
    "ems(budget=70)": lambda model: unequal.ems,
    "dbudgetkv(threshold=0.1)": lambda model: unequal.dbudgetkv("position", 0.1),
    "dbudgetkv(threshold=0.03,rank=attention)": lambda model: unequal.dbudgetkv("attention", 0.03),
}


def compare(model: Tiny, method: str, rule: naive.Naive, inside: int | None = None, **options: int) -> NaiveCache:
    """inside: prompt tokens between two events within the prompt."""
    recorder = Recorder()
    lane = build_lane(model.model.decoder, method, build_method(method), 32)
    config = EngineConfig(2**23, prefix_caching=False, **options)
    engine = Engine(model.model.decoder, model.model.tokenizer, [lane], config, recorder)
    policy = build_method(method).policy
    assert policy is not None
    budget = policy.budget
    before = 0

    def event(length: int) -> bool:
        if length < PROMPT:
            return inside is not None and length % inside == 0
        return (length - PROMPT) % EVERY == 0

    def drop(cache: NaiveCache, length: int) -> None:
        nonlocal before
        now = naive.Moment(length, before, budget if isinstance(budget, int) else round(budget * PROMPT), PROMPT)
        for (layer, head), kept in rule(cache, now).items():
            assert set(kept) <= set(cache.held[layer][head])
            cache.held[layer][head] = kept
        before = length

    def check(cache: NaiveCache, tables: StagedTables) -> None:
        same_rows(cache, tables, engine.memory.pool, exact="ems" not in method)

    return follow(engine, recorder, tokens(PROMPT, 3), GENERATED, event, drop, check)


@pytest.mark.parametrize("method", list(NAIVE))
def test_the_tokens_that_stay_are_the_papers(tiny: GetTiny, method: str) -> None:
    model = tiny("llama")
    cache = compare(model, method, NAIVE[method](model), chunk=50)
    assert sum(len(own) for layer in cache.held for own in layer) < 4 * (cache.length - 10)


@pytest.mark.parametrize(
    "method", ["snapkv(budget=70)", "expected(budget=70)", "ems(budget=70)", "kvcompress(budget=100,sinks=0)"]
)
def test_without_rope(tiny: GetTiny, method: str) -> None:
    compare(tiny("gpt2"), method, NAIVE[method](tiny("gpt2")), chunk=50)


@pytest.mark.parametrize(
    "method", ["adakv(budget=73)", "kvcompress(budget=100,sinks=0)", "ems(budget=70)", "expected(budget=70)"]
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (8, 1)])
def test_groups_of_one_three_and_eight(
    grouped: Callable[[int, int], Tiny], heads: int, kv_heads: int, method: str
) -> None:
    model = grouped(heads, kv_heads)
    compare(model, method, NAIVE[method](model), chunk=64)


@pytest.mark.parametrize("method", ["snapkv(budget=70)", "adakv(budget=73)", "h2o(budget=61)", "keydiff(budget=70)"])
def test_layers_with_a_sliding_window_keep_it_and_nothing_else(tiny: GetTiny, method: str) -> None:
    cache = compare(tiny("gemma3"), method, NAIVE[method](tiny("gemma3")), chunk=64)
    assert cache.windows == (40, None)


@pytest.mark.parametrize("name", ["snapkv", "h2o", "adakv", "keydiff", "tova", "pyramidkv"])
def test_batchmax_chooses_after_every_chunk_of_the_prompt(tiny: GetTiny, name: str) -> None:
    [rule] = [NAIVE[method](tiny("llama")) for method in NAIVE if method.startswith(name)]
    compare(tiny("llama"), f"batchmax(policy={name},budget=60,chunk=45)", rule, inside=45, chunk=30)


def test_a_cache_that_drops_nothing_has_the_keys_and_the_attention_of_transformers(tiny: GetTiny) -> None:
    """So the naive caches above start from the right numbers."""
    from transformers import AutoModelForCausalLM

    model = tiny("llama")
    cache = compare(model, "staged", lambda cache, now: {}, chunk=50)
    eager = AutoModelForCausalLM.from_pretrained(
        model.reference.config._name_or_path or model.model.path, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        dense = eager(torch.tensor([tokens(PROMPT, 3)]), output_attentions=True, use_cache=True)
    for layer in range(2):
        keys = dense.past_key_values.layers[layer].keys[0].transpose(0, 1).double()
        torch.testing.assert_close(cache.keys[layer][:PROMPT], keys, rtol=1e-3, atol=1e-4)
        for head in range(2):
            weights = dense.attentions[layer][0, 2 * head : 2 * head + 2].transpose(0, 1).double()
            ours = cache.attention[layer][head][:PROMPT, :, :PROMPT]
            torch.testing.assert_close(ours, weights, rtol=1e-3, atol=1e-5)
