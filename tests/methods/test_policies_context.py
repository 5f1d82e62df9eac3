"""A context that is compressed before the question is read: the question has no say in what stays, and other questions
find the context read."""

from collections.abc import Callable

import pytest
import torch

from kvfold.engine.engine import Engine
from kvfold.engine.outputs import RequestOutput
from kvfold.errors import PromptError
from kvfold.kv.pool import PagePool
from kvfold.kv.staged_tables import StagedTables
from kvfold.methods.held import stored_rows
from kvfold.methods.staging import Staging
from tests.engine.tiny import Tiny, generated, greedy, tokens

GetTiny = Callable[[str], Tiny]
CONTEXT, QUESTIONS = tokens(150, 1), [tokens(20, 2), tokens(33, 3)]
POLICIES = ["snapkv", "pyramidkv", "adakv", "kvcompress", "h2o", "tova", "expected", "keydiff", "ems", "batchmax"]
METHODS = [f"{name}(budget=100,compress=context)" for name in POLICIES]
METHODS += ["dbudgetkv(compress=context,threshold=0.2)", "snapkv(budget=80,compress=context)+kivi(recent=16,group=16)"]
METHODS += ["staged(compress=context)+zipcache(recent=16,every=32)"]


def ask(engine: Engine, question: list[int], context: int | None = 150, lane: int = 0) -> RequestOutput:
    engine.add_request(CONTEXT + question, greedy(20, logprobs=0), context=context, lane=lane)
    output = None
    while engine.has_unfinished:
        [output] = engine.step()[-1:] or [output]
        engine.check_integrity()
    assert output is not None
    return output


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[torch.Tensor]]]:
    """Every event: the length, and what is held after it."""
    seen: list[tuple[int, list[torch.Tensor]]] = []
    settle = Staging.settle

    def watched(self: Staging, pool: PagePool, tables: StagedTables) -> None:
        settle(self, pool, tables)
        heads = [(t, h) for t in range(tables.layout.tracks) for h in range(tables.layout.heads)]
        held = [x for t, h in heads if tables.rows[t, h] for x in stored_rows(pool, tables, t, h)]
        seen.append((tables.length, held))

    monkeypatch.setattr(Staging, "settle", watched)
    return seen


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_the_question_has_no_say_and_a_context_is_read_once(
    tiny: GetTiny, settled: list[tuple[int, list[torch.Tensor]]], method: str
) -> None:
    model = tiny("llama")
    fresh = [ask(model.engine(method, prefix_caching=False), question) for question in QUESTIONS]
    first, second = (held for length, held in settled if length == 150)
    assert equal(first, second)
    assert {length for length, _ in settled if length > 150} == {182}

    engine = model.engine(method)
    found = [ask(engine, question) for question in (*QUESTIONS, QUESTIONS[0])]
    cached = [output.metrics.cached_prompt_tokens for output in found]
    assert cached == ([0, 0, 0] if "batchmax" in method else [0, 150, 150])
    for output, expected in zip(found, [*fresh, fresh[0]], strict=True):
        assert generated([output]) == generated([expected])
        for one, other in zip(output.outputs[0].logprobs or [], expected.outputs[0].logprobs or [], strict=True):
            assert {t: entry.logprob for t, entry in one.items()} == pytest.approx(
                {t: entry.logprob for t, entry in other.items()}, abs=1e-3
            )
    engine.memory.prefixes[0].clear()
    assert engine.memory.pool.bytes_in_use == 0


def test_with_the_prompt_the_question_has_a_say(tiny: GetTiny, settled: list[tuple[int, list[torch.Tensor]]]) -> None:
    """What makes the test above mean something."""
    for question in (tokens(33, 2), tokens(33, 3)):
        ask(tiny("llama").engine("snapkv(budget=100,recent=1)"), question, None)
    kept = [held[0][:50] for length, held in settled if length == 183]
    assert not torch.equal(*kept)


def test_a_context_serves_other_methods_too(tiny: GetTiny) -> None:
    """It is kept as it was before anything was dropped, with what every lane wants to have watched."""
    methods = [m for m in METHODS if "batchmax" not in m]
    engine = tiny("llama").engine(*methods)
    outputs = [ask(engine, QUESTIONS[0], lane=lane) for lane in range(len(methods))]
    assert [o.metrics.cached_prompt_tokens for o in outputs] == [0] + [150] * (len(methods) - 1)
    for method, output in zip(methods, outputs, strict=True):
        assert generated([output]) == generated([ask(tiny("llama").engine(method), QUESTIONS[0])]), method


def test_requests_that_come_together_read_their_context_once(tiny: GetTiny) -> None:
    engine = tiny("llama").engine("snapkv(budget=80,compress=context)", chunk=40)
    expected = generated([ask(engine, QUESTIONS[0])])
    engine.memory.prefixes[0].clear()
    contexts = [CONTEXT, CONTEXT, tokens(150, 7), [*CONTEXT[:149], 0], CONTEXT]
    ids = [engine.add_request(context + QUESTIONS[0], greedy(20), context=150) for context in contexts]
    outputs = {}
    while engine.has_unfinished:
        outputs |= {output.request_id: output for output in engine.step()}
        engine.check_integrity()
    assert [outputs[i].metrics.cached_prompt_tokens for i in ids] == [0, 150, 0, 0, 150]
    assert all(generated([outputs[ids[i]]]) == expected for i in (0, 1, 4))


def test_a_context_in_use_outlives_older_prefixes_of_other_lanes(tiny: GetTiny) -> None:
    """Snapshots are dropped by when they were used last, whichever lane they are of."""
    methods = ["snapkv(budget=80,compress=context)", "none"]
    ample = tiny("llama").engine(*methods)
    pages = ample.memory.pages(0, 170, 150)
    engine = tiny("llama").engine(*methods, kv_memory=3 * pages * ample.memory.pool.page_bytes, prefix_block=32)
    cached = []
    for seed in range(8):
        cached.append(ask(engine, QUESTIONS[0]).metrics.cached_prompt_tokens)
        engine.add_request(tokens(160, 20 + seed), greedy(2), lane=1)
        while engine.has_unfinished:
            engine.step()
    assert cached == [0] + 7 * [150]


@pytest.mark.parametrize(
    "method", ["staged(compress=context)+int4(recent=16)", METHODS[-2], "tova(budget=0.9,compress=context)"]
)
@pytest.mark.parametrize("more", [0, 1, 5, 12, 24])
def test_a_context_is_remembered_only_where_there_is_room(tiny: GetTiny, method: str, more: int) -> None:
    """A snapshot shares its pages with the sequence whose event comes next, and must not take the event's room."""
    ample = tiny("llama").engine(method)
    pages = ample.memory.pages(0, 170, 150)
    engine = tiny("llama").engine(method, kv_memory=(pages + more) * ample.memory.pool.page_bytes)
    for question in (QUESTIONS[0], QUESTIONS[0]):
        assert generated([ask(engine, question)]) == generated([ask(ample, question)])


def test_a_context_that_is_not_marked_or_out_of_range_is_refused(tiny: GetTiny) -> None:
    engine = tiny("llama").engine(METHODS[0], "snapkv(budget=100)")
    with pytest.raises(PromptError, match="give the context apart"):
        engine.add_request(CONTEXT, greedy(1))
    for context in (0, -1, 151):
        with pytest.raises(PromptError, match="give 1 to the prompt's 150 tokens"):
            engine.add_request(CONTEXT, greedy(1), context=context)
    engine.add_request(CONTEXT, greedy(1), context=150)  # an empty question
    engine.add_request(CONTEXT, greedy(1), lane=1, context=10)  # compresses the prompt, whatever is marked
    while engine.has_unfinished:
        engine.step()
    engine.check_integrity()
