"""A tokenizer's vocabulary as grammars see it: each token as the bytes it adds to the text."""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from xgrammar import TokenizerInfo, VocabType

from kvfold.errors import GrammarError

JSON, TEXT = b"J", b"T"
"""Kinds of grammars, the first byte of a compiled one: JSON alone, or text with JSON in it."""

_FORBIDDEN = {JSON: bytes(range(32)), TEXT: bytes(set(range(32)) - set(b"\t\n\r"))}


class Vocabularies:
    """The vocabulary for each kind of grammar, made when it is first wanted; arguments as `grammar_vocabulary`'s."""

    def __init__(self, tokenizer: Any, vocab_size: int, stop_token_ids: Iterable[int]) -> None:
        stops = sorted({token for token in stop_token_ids if token < vocab_size})
        self.size = vocab_size
        self.of = lru_cache(2)(lambda kind: grammar_vocabulary(tokenizer, vocab_size, stops, kind))


def grammar_vocabulary(tokenizer: Any, vocab_size: int, stops: list[int], kind: bytes) -> TokenizerInfo:
    """The bytes of every token id below `vocab_size`; special tokens and padding have none and are never allowed.

    Special tokens leave no trace in the text, so a grammar must not take them for the characters of their names.
    Nor are tokens with control characters: compact JSON has none, and xgrammar's rule for strings of limited length
    would let them through. Texts keep blanks and line ends.
    Raises GrammarError for a tokenizer whose tokens cannot be read as bytes.
    """
    try:
        # xgrammar insists on a stop token here; the real ones are given below.
        info = TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size, stop_token_ids=stops or [0])
    except (ValueError, RuntimeError) as error:
        raise GrammarError("the model's tokenizer cannot be constrained; use a fast tokenizer") from error
    tokens = [bytes(token) for token in info.decoded_vocab]
    for token_id, added in tokenizer.added_tokens_decoder.items():
        if token_id < vocab_size:
            tokens[token_id] = b"" if added.special else added.content.encode()
    for token_id in {*tokenizer.all_special_ids, *stops}:
        if token_id < vocab_size:
            tokens[token_id] = b""
    forbidden = set(_FORBIDDEN[kind])
    return TokenizerInfo(
        [b"" if forbidden.intersection(token) else token for token in tokens],
        VocabType.RAW,
        vocab_size=vocab_size,
        stop_token_ids=stops,
        add_prefix_space=info.add_prefix_space,
    )
