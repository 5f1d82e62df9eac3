"""Prompts have the wanted number of tokens; equal blocks are equal text, other requests share no prefix."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.benchmark.corpus import Corpus, load_corpus
from kvfold.benchmark.counting import EstimatedCounter
from kvfold.benchmark.prompts import COMMON_WORDS, SEGMENT_WORDS, PromptBuilder

from .fake import BOS, count_tokens
from .texts import leading, shared_tokens, tokens

T = TypeVar("T")
CORPUS = load_corpus(None)


class FakeCounter:
    """The fake server's tokenizer without its special tokens; counts how often it is asked, and for how much."""

    exact = True

    def __init__(self) -> None:
        self.calls = self.characters = 0

    async def count(self, text: str) -> int:
        self.calls += 1
        self.characters += len(text)
        return count_tokens(text) - BOS


def builder(seed: int = 0, corpus: Corpus = CORPUS) -> PromptBuilder:
    return PromptBuilder(corpus, FakeCounter(), seed)


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


@given(st.integers(1, 5000), st.integers(0, 100), st.text(max_size=5))
@settings(max_examples=40)
def test_prompts_have_exactly_the_wanted_tokens(wanted: int, seed: int, key: str) -> None:
    passage = run(builder(seed).unique(key, wanted))
    assert passage.tokens == wanted == tokens(passage.text)
    assert passage.text == passage.text.strip()


@given(st.lists(st.text("abcdefg", min_size=1, max_size=30), min_size=1, max_size=10), st.integers(1, 200))
@settings(max_examples=40)
def test_any_corpus_will_do(words: list[str], wanted: int) -> None:
    passage = run(builder(corpus=Corpus("tiny", tuple(words))).unique("key", wanted))
    assert passage.tokens == wanted == tokens(passage.text)


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=6), st.lists(st.integers(0, 3), min_size=1, max_size=6), st.data()
)
@settings(max_examples=40)
def test_equal_leading_blocks_are_equal_leading_text(a: list[int], b: list[int], data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 40))
    build = builder()
    lengths = [size * (len(ids) - 1) + data.draw(st.integers(1, size)) for ids in (a, b)]
    texts = []
    for ids, length in zip((a, b), lengths, strict=True):
        passage = run(build.blocks(tuple(ids), size, length))
        assert passage.tokens == length == tokens(passage.text)
        texts.append(passage.text)
    shared = leading(a, b)
    whole = min(shared, *(length // size for length in lengths))
    assert shared_tokens(*texts) >= whole * size
    if (tuple(a), lengths[0]) == (tuple(b), lengths[1]):
        assert texts[0] == texts[1]


def test_a_cut_block_is_the_beginning_of_the_whole_one() -> None:
    build = builder()
    whole, cut = (run(build.blocks((7,), 512, length)).text.split() for length in (512, 300))
    assert leading(whole, cut) > 0.7 * len(cut)  # but for what fills up to the exact number


def test_keys_seeds_and_blocks_differ_from_the_beginning() -> None:
    texts = [run(builder(seed).unique(key, 400)).text for seed in (0, 1) for key in ("a", "b", "c")]
    texts += [run(builder().blocks((block,), 400, 400)).text for block in range(3)]
    for i, text in enumerate(texts):
        for other in texts[:i]:
            assert shared_tokens(text, other) < 20
    assert run(builder(1).unique("a", 400)).text == texts[3]


@given(st.integers(1, 100), st.integers(1, 200))
@settings(max_examples=30)
def test_a_shared_prefix_is_shared_and_no_more(prefix: int, wanted: int) -> None:
    build = builder()
    a, b = (run(build.shared(prefix, key, wanted)) for key in ("a", "b"))
    assert a.tokens == b.tokens == wanted == tokens(a.text)
    assert shared_tokens(a.text, b.text) >= min(prefix, wanted)
    if wanted > prefix + 50:
        assert shared_tokens(a.text, b.text) < prefix + 20


def test_the_tokenizer_is_asked_a_bounded_number_of_times() -> None:
    counter = FakeCounter()
    build = PromptBuilder(CORPUS, counter, 0)
    for i in range(200):
        run(build.unique(str(i), 5000))
    # Twice: at the beginning of a prompt and within one.
    assert counter.calls <= len(CORPUS.words) // SEGMENT_WORDS + 1 + 2 * COMMON_WORDS


@pytest.mark.parametrize("ratio", [0.01, 0.25, 3.0])
def test_estimated_lengths_follow_the_characters(ratio: float) -> None:
    counter = EstimatedCounter(ratio)
    passage = run(PromptBuilder(CORPUS, counter, 0).unique("key", 2000))
    assert passage.tokens == pytest.approx(2000, rel=0.02)
    if ratio > 0.1:  # below that a single word is rounded up to a whole token
        assert len(passage.text) * ratio == pytest.approx(2000, rel=0.02)


def test_a_tokenizer_that_counts_nothing_does_not_hang() -> None:
    class Nothing(FakeCounter):
        async def count(self, text: str) -> int:
            return 0

    assert run(PromptBuilder(CORPUS, Nothing(), 0).unique("key", 50)).tokens == 50
