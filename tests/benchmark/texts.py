"""Comparing prompts."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from .fake import BOS, count_tokens


def tokens(text: str) -> int:
    """Tokens of a text by the fake server's tokenizer, without special ones."""
    return count_tokens(text) - BOS


def leading(*lists: Sequence[Any]) -> int:
    """How many leading items all lists share."""
    return len(list(takewhile(lambda items: len(set(items)) == 1, zip(*lists, strict=False))))


def shared_tokens(*texts: str) -> int:
    """Tokens of the leading words that all texts share."""
    words = [text.split() for text in texts]
    return tokens(" ".join(words[0][: leading(*words)]))
