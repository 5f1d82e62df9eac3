"""Prompts of a wanted number of tokens, cut from a corpus.

A prompt is a list of pieces of whole words, joined by spaces. Tokenizers split at spaces first, so the tokens of
pieces add up. The pieces are those of one list (segments of the corpus and its most common words), so a tokenizer is
asked a bounded number of times, however many prompts are made.
"""

from collections import Counter
from dataclasses import dataclass
from random import Random

from kvfold.benchmark.corpus import Corpus
from kvfold.benchmark.counting import TokenCounter

SEGMENT_WORDS = 32
COMMON_WORDS = 256
HEAD_WORDS = 4
"""Random words that begin a passage: two passages that happen to start at one place still share no prefix."""

FILLER = "a"
"""A word of one token in practically every tokenizer."""


@dataclass(frozen=True)
class Passage:
    """Text without spaces at its ends and its number of tokens, counted where it stands."""

    text: str
    tokens: int


class PromptBuilder:
    """Cuts passages; equal `key`s and lengths give equal text, in every process with the same `seed`."""

    def __init__(self, corpus: Corpus, counter: TokenCounter, seed: int) -> None:
        self.corpus = corpus
        self.counter = counter
        self.seed = seed
        self.common = [word for word, _ in Counter(corpus.words).most_common(COMMON_WORDS)]
        self._counts: dict[str, int] = {}
        self._passages: dict[tuple[str, int, bool], Passage] = {}

    async def ready(self, text: str) -> Passage:
        """`text` as it is, counted."""
        return Passage(text, await self._count(text, spaced=False))

    async def unique(self, key: str, tokens: int) -> Passage:
        """A prompt of `tokens` tokens that shares no prefix with those of other keys."""
        return await self._passage(key, tokens, begins=True)

    async def shared(self, prefix_tokens: int, key: str, tokens: int) -> Passage:
        """A prompt whose first `prefix_tokens` tokens are the same for all keys; a shorter one is only prefix."""
        prefix = await self._cached("prefix", min(prefix_tokens, tokens), begins=True)
        if tokens <= prefix_tokens:
            return prefix
        return _join([prefix, await self._passage(key, tokens - prefix_tokens, begins=False)])

    async def blocks(self, ids: tuple[int, ...], block_tokens: int, tokens: int) -> Passage:
        """A prompt of blocks of `block_tokens` tokens, the last one cut; equal leading ids give equal leading text."""
        parts = []
        for start, block in zip(range(0, tokens, block_tokens), ids, strict=False):
            size = min(block_tokens, tokens - start)
            parts.append(await self._cached(f"block {block}", size, begins=start == 0))
        return _join(parts)

    async def _cached(self, key: str, tokens: int, begins: bool) -> Passage:
        """Like `_passage`, for text that many prompts share."""
        known = self._passages.get((key, tokens, begins))
        if known is None:
            known = self._passages[key, tokens, begins] = await self._passage(key, tokens, begins)
        return known

    async def _passage(self, key: str, tokens: int, begins: bool) -> Passage:
        """Some random words, consecutive segments of the corpus, and random words up to the exact number.

        begins: whether it begins the prompt; the first word of others is counted with the space before it.
        """
        words, rng = self.corpus.words, Random(f"{self.seed} {key}")
        parts: list[str] = []
        left = tokens

        async def add(text: str) -> bool:
            nonlocal left
            used = await self._count(text, spaced=bool(parts) or not begins)
            if used <= left or (text == FILLER and not parts):  # even a prompt of one token has a word
                parts.append(text)
                left -= used
                return True
            return False

        for _ in range(HEAD_WORDS):
            await add(rng.choice(self.common))
        start = rng.randrange(0, len(words), SEGMENT_WORDS)  # aligned, so that each segment is counted once
        while await add(" ".join(words[start : start + SEGMENT_WORDS])):
            start = start + SEGMENT_WORDS if start + SEGMENT_WORDS < len(words) else 0
        while left > 0 and (await add(rng.choice(self.common)) or await add(FILLER)):
            pass
        return Passage(" ".join(parts), tokens - left)

    async def _count(self, text: str, spaced: bool) -> int:
        piece = " " + text if spaced else text
        known = self._counts.get(piece)
        if known is None:
            # At least 1, so that a server that counts nothing cannot keep us cutting for ever.
            known = self._counts[piece] = max(1, await self.counter.count(piece))
        return known


def _join(parts: list[Passage]) -> Passage:
    return Passage(" ".join(part.text for part in parts), sum(part.tokens for part in parts))
