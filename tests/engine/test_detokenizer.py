"""Incremental text equals the tokenizer's decoding of the whole, whatever the tokens and the stop strings."""

from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvfold.engine.detokenizer import Detokenizer, StopStrings
from kvfold.engine.params import SamplingParams

CORPUS = [
    "the cat sat on the mat, the end.",
    "naïve café 你好世界 🙂🙃 👩‍👩‍👧",
    "stop STOP\n\nUser: hello",
]
SPECIAL = "<|end|>"


@cache
def byte_level() -> Tokenizer:
    """GPT-2's kind: every token is a run of bytes, so that characters span tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=[SPECIAL], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@cache
def byte_fallback() -> Tokenizer:
    """Llama 2's kind: the first space is stripped, unknown characters are single byte tokens."""
    pieces = [SPECIAL, "▁", "▁▁", "▁the", "▁cat", "s", "t", "o", "p", "▁stop", "."]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    vocabulary |= {f"<0x{byte:02X}>": len(pieces) + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(SPECIAL, special=True)])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def stream(tokenizer: Any, ids: list[int], **options: Any) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(tokenizer, SamplingParams(max_tokens=None, **options))
    pieces = [detokenizer.push(token_id) for token_id in ids]
    return [*pieces, detokenizer.finish()], detokenizer


def cut(text: str, stops: list[str], include: bool = False) -> tuple[str, str | None]:
    """`text` up to the stop string that is complete first (then: that starts first), by definition."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


ANY_TOKENS = st.lists(st.integers(0, 319), max_size=40)
STOPS = st.lists(st.text("the .aST\n�🙂", min_size=1, max_size=4), max_size=4)


@settings(max_examples=300, deadline=None)
@given(ids=ANY_TOKENS, skip=st.booleans())
def test_pieces_join_to_the_whole(ids: list[int], skip: bool) -> None:
    pieces, detokenizer = stream(byte_level(), ids, skip_special_tokens=skip)
    assert "".join(pieces) == byte_level().decode(ids, skip_special_tokens=skip)
    assert detokenizer.text == "".join(pieces)
    assert detokenizer.stopped_by is None


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30))
@example("👩‍👩‍👧 é 你好 \N{REPLACEMENT CHARACTER} end")
def test_no_partial_character_is_ever_shown(text: str) -> None:
    ids = byte_level().encode(text).ids
    pieces, _ = stream(byte_level(), ids)
    assert "".join(pieces) == text
    shown = ""
    for piece in pieces:
        shown += piece
        assert text.startswith(shown)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 10) | st.sampled_from(["é", "你", "🙂", "a"]), max_size=25))
def test_pieces_join_with_byte_fallback_and_stripped_spaces(parts: list[int | str]) -> None:
    ids: list[int] = []
    for part in parts:
        ids += [part] if isinstance(part, int) else [11 + byte for byte in part.encode()]
    pieces, _ = stream(byte_fallback(), ids)
    assert "".join(pieces) == byte_fallback().decode(ids)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 10) | st.integers(11 + 0x80, 11 + 0xFF), max_size=25))
@example([3, *(11 + byte for byte in "你".encode()), 11 + 0xFF, 3])
def test_invalid_bytes_take_nothing_from_the_other_tokens(ids: list[int]) -> None:
    """Byte fallback takes back a whole run of bytes for one that is wrong; text already shown stays."""

    def ascii_only(text: str) -> str:
        return "".join(filter(str.isascii, text))

    _, detokenizer = stream(byte_fallback(), ids)
    assert ascii_only(detokenizer.text) == ascii_only(byte_fallback().decode(ids))


@settings(max_examples=300, deadline=None)
@given(ids=ANY_TOKENS, stops=STOPS, include=st.booleans())
def test_text_ends_at_the_first_stop_string(ids: list[int], stops: list[str], include: bool) -> None:
    whole = byte_level().decode(ids)
    pieces, detokenizer = stream(byte_level(), ids, stop=stops, include_stop_str_in_output=include)
    assert ("".join(pieces), detokenizer.stopped_by) == cut(whole, stops, include)
    assert (detokenizer.stopped_by is not None) == any(whole.find(stop) >= 0 for stop in stops)


@settings(max_examples=200, deadline=None)
@given(pieces=st.lists(st.text("ab", max_size=4)), stops=st.lists(st.text("ab", min_size=1, max_size=5)))
def test_the_cut_does_not_depend_on_the_division(pieces: list[str], stops: list[str]) -> None:
    search = StopStrings(stops)
    shown = ""
    for piece in pieces:
        shown += search.push(piece)
        text = cut("".join(pieces), stops)[0]
        assert text.startswith(shown)
    assert (shown + search.flush(), search.found) == cut("".join(pieces), stops)


def encode_each(text: str) -> list[int]:
    """One token per character of ASCII text."""
    return [byte_level().encode(character).ids[0] for character in text]


def test_a_stop_string_over_three_tokens_is_never_shown() -> None:
    pieces, detokenizer = stream(byte_level(), encode_each("so STOP it"), stop=["STOP"])
    assert pieces == ["s", "o", " ", "", "", "", "", "", "", "", ""]
    assert detokenizer.stopped_by == "STOP"
    assert detokenizer.text == "so "


def test_a_false_start_is_shown_in_the_end() -> None:
    assert stream(byte_level(), encode_each("STSTOX"), stop=["STOP"])[1].text == "STSTOX"
    pieces, detokenizer = stream(byte_level(), encode_each("a ST"), stop="STOP")
    assert pieces == ["a", " ", "", "", "ST"]
    assert detokenizer.stopped_by is None


@pytest.mark.parametrize(("min_tokens", "text"), [(0, "a"), (5, "a"), (6, "a.end"), (9, "a.end"), (10, "a.end.end")])
def test_stop_strings_count_from_min_tokens_on(min_tokens: int, text: str) -> None:
    """The stop string is complete with the fifth and with the ninth token."""
    detokenizer = stream(byte_level(), encode_each("a.end.end"), stop=".end", min_tokens=min_tokens)[1]
    assert detokenizer.text == text
    assert detokenizer.stopped_by == (None if min_tokens == 10 else ".end")


def test_a_stop_string_may_begin_before_min_tokens_but_a_shorter_one_must_not_end_there() -> None:
    detokenizer = stream(byte_level(), encode_each("a.end"), stop=[".en", ".end"], min_tokens=5)[1]
    assert (detokenizer.text, detokenizer.stopped_by) == ("a", ".end")


def test_a_character_held_back_is_released_at_the_end() -> None:
    first_byte_of_four = byte_level().get_vocab()["ð"]
    pieces, _ = stream(byte_level(), [*encode_each("ok"), first_byte_of_four])
    assert pieces == ["o", "k", "", "\N{REPLACEMENT CHARACTER}"]


def test_tokenizers_of_transformers_serve_with_and_without_the_rust_backend() -> None:
    fast = PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token=SPECIAL)

    class Slow:
        """Only what a slow tokenizer has in common with a fast one."""

        def decode(self, ids: list[int], /, *, skip_special_tokens: bool = False) -> str:
            return str(fast.decode(ids, skip_special_tokens=skip_special_tokens))

    ids = [0, *byte_level().encode(CORPUS[1]).ids, 0]
    for skip in (True, False):
        whole = fast.decode(ids, skip_special_tokens=skip)
        assert stream(fast, ids, skip_special_tokens=skip)[1].text == whole
        assert stream(Slow(), ids, skip_special_tokens=skip)[1].text == whole
