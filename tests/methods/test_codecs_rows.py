"""What is read back from coded rows: against each paper's quantiser in plain loops, on what a tiny model computed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvfold.config.engine import EngineConfig
from kvfold.engine.engine import Engine
from kvfold.engine.lane import build_lane
from kvfold.methods.held import HeldRows, stored_rows
from kvfold.methods.registry import build_method
from tests.engine.tiny import Tiny, tokens
from tests.methods import naive_codecs as naive
from tests.methods.naive_cache import NaiveCache, Recorder, read_prompt

GetTiny = Callable[[str], Tiny]
PROMPT = 230
Rows = dict[tuple[int, int], tuple[Tensor, Tensor]]


def held_after_prompt(model: Tiny, method: str, length: int = PROMPT) -> tuple[NaiveCache, HeldRows, Engine]:
    recorder = Recorder()
    lane = build_lane(model.model.decoder, method, build_method(method), 32, model.statistics)
    config = EngineConfig(2**23, prefix_caching=False, chunk=64)
    engine = Engine(model.model.decoder, model.model.tokenizer, [lane], config, recorder)
    cache, tables = read_prompt(engine, recorder, tokens(length, 5))
    return cache, HeldRows(engine.memory.pool, tables), engine


def full(cache: NaiveCache) -> list[tuple[int, int, int]]:
    """(index among layers without a window, layer, head)."""
    layers = [layer for layer, window in enumerate(cache.windows) if window is None]
    return [(i, layer, head) for i, layer in enumerate(layers) for head in range(cache.kv_heads)]


ONE_CLASS = {
    # method: sinks, recent, block, keys, values
    "staged+kivi(recent=40)": (4, 40, 32, lambda k: naive.per_channel(k, 2, 32), lambda v: naive.per_token(v, 2, 16)),
    "staged+kivi(bits=4,value_bits=2,group=16,sinks=0)": (
        (0, 128, 16, lambda k: naive.per_channel(k, 4, 16), lambda v: naive.per_token(v, 2, 16))
    ),
    "staged+kivi(group=8,recent=40)": (
        (4, 40, 8, lambda k: naive.per_channel(k, 2, 8), lambda v: naive.per_token(v, 2, 8))
    ),
    "staged+int8(recent=30)": (4, 30, 16, lambda k: naive.per_token(k, 8, 16), lambda v: naive.per_token(v, 8, 16)),
    "staged+int4(recent=30)": (4, 30, 16, lambda k: naive.per_token(k, 4, 16), lambda v: naive.per_token(v, 4, 16)),
    "staged+hack": (4, 64, 64, lambda k: naive.per_token(k, 2, 16), lambda v: naive.per_channel(v, 2, 64)),
}


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("method", list(ONE_CLASS))
def test_rows_are_the_papers_quantisers(tiny: GetTiny, family: str, method: str) -> None:
    sinks, recent, block, *quantise = ONE_CLASS[method]
    cache, held, _ = held_after_prompt(tiny(family), method)
    coded = (PROMPT - sinks - recent) // block * block
    for i, layer, head in full(cache):
        assert held.counts[i, head] == PROMPT
        assert (held.track[i, head, sinks : sinks + coded] == 1).all()
        assert int((held.track[i, head] == 1).sum()) == coded
        for rows, ours, code in zip(held.rows(i), (cache.keys[layer], cache.values[layer]), quantise, strict=True):
            expected = ours[:, head].clone()
            expected[sinks : sinks + coded] = code(expected[sinks : sinks + coded])
            found = rows[head].double()
            # A number on the border of two levels may fall to either side: rarely.
            wrong = (found - expected).abs() > 1e-3 * expected.abs().amax()
            assert wrong.float().mean() < 2e-3
            assert torch.equal(found[:sinks], expected[:sinks])
            assert torch.equal(found[sinks + coded :], expected[sinks + coded :])


def positions_of(held: HeldRows, cache: NaiveCache, i: int, layer: int, head: int, track: int) -> list[int]:
    """Which tokens are in a track, by the nearest uncompressed row."""
    rows = torch.cat([side[head] for side in held.rows(i)], 1)[(held.track[i, head] == track) & held.valid[i, head]]
    raw = torch.cat([side[layer][:, head] for side in (cache.keys, cache.values)], 1)
    return [int((raw - row).norm(dim=-1).argmin()) for row in rows.double()]


def test_zipcache_gives_salient_tokens_more_bits(tiny: GetTiny) -> None:
    cache, held, _ = held_after_prompt(tiny("llama"), "zipcache(hi=8,lo=4,salient=0.6,sinks=0,recent=1)")
    for i, layer, head in full(cache):
        loose = list(range(PROMPT - 1))  # all but the newest
        best = naive.salient(cache.attention[layer][head], loose, 0.6)
        classes = sorted(best), sorted(set(loose) - best)
        coded = [own[: len(own) // block * block] for own, block in zip(classes, (1, 2), strict=True)]
        every = cache.values[layer][sorted(coded[0] + coded[1]), head]
        for track, (bits, own) in enumerate(zip((8, 4), coded, strict=True), 1):
            assert positions_of(held, cache, i, layer, head, track) == own
            there = (held.track[i, head] == track) & held.valid[i, head]
            for side, ours in zip(held.rows(i), (cache.keys[layer], cache.values[layer]), strict=True):
                raw = ours[own, head]
                error = (side[head][there].double() - raw).abs()
                spread = raw.amax(0) - raw.amin(0)
                if side is held.rows(i)[0]:  # one scale per channel
                    assert (error <= 0.51 * spread / (2**bits - 1) + 1e-3 * spread).all()
                else:  # c = sqrt(largest) per channel, then one step per token that may be 6 % too large
                    middle = (every.amax(0) + every.amin(0)) / 2
                    c = (every - middle).abs().amax(0).sqrt()
                    step = ((raw - middle) / c).abs().amax(1, keepdim=True) * 2 / (2**bits - 1)
                    assert (error <= 0.54 * step * c + 4e-3 * c).all()


def test_zeroc_gives_salient_tokens_more_bits(tiny: GetTiny) -> None:
    cache, held, _ = held_after_prompt(tiny("llama"), "zeroc(bits=4,salient_bits=8,salient=0.25,recent=30)")
    errors = torch.zeros(2)
    for i, layer, head in full(cache):
        loose = list(range(4, PROMPT - 30))
        best = naive.salient(cache.attention[layer][head], loose, 0.25)
        for track, own in enumerate((sorted(best), sorted(set(loose) - best)), 1):
            own = own[: len(own) // 16 * 16]
            there = (held.track[i, head] == track) & held.valid[i, head]
            assert int(there.sum()) == len(own)
            raw = cache.values[layer][own, head]
            errors[track - 1] += float((held.rows(i)[1][head][there] - raw).square().mean() / raw.square().mean())
    assert errors[0] < 0.2 * errors[1]
    assert errors[1] < 4 * 0.2


def test_think_stores_the_channels_that_queries_use(tiny: GetTiny) -> None:
    cache, held, engine = held_after_prompt(tiny("llama"), "think(keep=0.6)")
    kept = round(0.6 * 16)
    for i, layer, head in full(cache):
        queries = cache.queries[layer][:PROMPT, 2 * head : 2 * head + 2]
        index = naive.channels(queries, cache.keys[layer][:PROMPT, head], kept)
        keys, values = (side[head].double() for side in held.rows(i))
        expected = torch.zeros_like(keys)
        expected[:, index] = cache.keys[layer][:, head][:, index]
        expected[PROMPT - 32 :] = cache.keys[layer][PROMPT - 32 :, head]
        assert torch.equal(keys, expected)
        assert torch.equal(values, cache.values[layer][:, head])
        stored = stored_rows(engine.memory.pool, held._tables, 1, layer * cache.kv_heads + head)
        assert stored[0].shape == (PROMPT - 32, kept)  # the others really are not there


def test_decoquant_is_closer_than_plain_integers_where_channels_have_outliers(tiny: GetTiny) -> None:
    """Keys of a random model get two large channels, as those of real ones have."""
    model = tiny("llama")
    with torch.no_grad():
        weights = model.model.decoder.attention_weights
        saved = [w.qkv.clone() for w in weights]
        for w in weights:
            w.qkv.view(-1, 16, w.qkv.shape[1])[4:, [3, 9]] *= 12  # of keys and values
    try:
        errors = {}
        for method in ("decoquant(bits=4,sinks=4,recent=32)", "staged+int4(recent=32)"):
            cache, held, _ = held_after_prompt(model, method)
            errors[method] = [
                float((held.rows(i)[side][head] - ours[layer][:, head]).square().sum())
                for i, layer, head in full(cache)
                for side, ours in enumerate((cache.keys, cache.values))
            ]
    finally:
        for w, old in zip(weights, saved, strict=True):
            w.qkv.copy_(old)
    ours, plain = errors.values()
    assert sum(ours) < 0.7 * sum(plain)
    assert sum(a < b for a, b in zip(ours, plain, strict=True)) >= 7
