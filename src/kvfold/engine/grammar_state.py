"""Where a completion stands in its grammar, and which tokens may come next."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
import xgrammar

from kvfold.engine.vocabulary import Vocabularies
from kvfold.errors import GrammarError

_KEPT = 16  # grammars read before; clients send the same few again and again


class GrammarReader:
    """Reads what `GrammarCompiler` wrote; arguments as there."""

    def __init__(self, tokenizer: Any, vocab_size: int, stop_token_ids: Iterable[int]) -> None:
        self._vocabularies = Vocabularies(tokenizer, vocab_size, stop_token_ids)
        self._read = lru_cache(_KEPT)(self._parse)

    def start(self, grammar: bytes) -> "GrammarState":
        """The state before the first token. Raises GrammarError for bytes that another model's compiler wrote."""
        return GrammarState(self._read(grammar), self._vocabularies.size)

    def _parse(self, grammar: bytes) -> xgrammar.CompiledGrammar:
        try:
            vocabulary = self._vocabularies.of(grammar[:1])
            return xgrammar.CompiledGrammar.deserialize_json(grammar[1:].decode(), vocabulary)
        except (RuntimeError, UnicodeDecodeError, KeyError) as error:
            raise GrammarError("the compiled grammar is not one of this model; compile it again") from error


class GrammarState:
    """The state of one completion. It follows the completion's tokens, so preemption does not touch it."""

    def __init__(self, compiled: xgrammar.CompiledGrammar, vocab_size: int) -> None:
        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._vocab_size = vocab_size
        self._accepted = 0
        self._dead = False
        self._bitmask: torch.Tensor | None = None

    def follow(self, token_ids: Sequence[int]) -> None:
        """Takes in what was appended to the completion's tokens since the last call."""
        for token_id in token_ids[self._accepted :]:
            self._dead = self._dead or not self._matcher.accept_token(token_id)
            self._bitmask = None
        self._accepted = len(token_ids)

    @property
    def ended(self) -> bool:
        """True where the output is complete and nothing but a stop token could follow."""
        if self._dead:
            return False
        return self._matcher.is_terminated() or (self._matcher.is_completed() and not self._goes_on())

    def allowed(self, banned: Iterable[int] = (), *, eos: bool = True) -> torch.Tensor:
        """Which tokens may come next: a bit per token id, int32 [ceil(V / 32)] on the CPU, not to be changed.

        banned: ids to leave out, and with eos=False the model's ends of sequence, unless nothing else is left: the
        grammar is the stronger rule.
        """
        allowed = self._allowed()
        others = _without(allowed, [*banned, *(() if eos else self._matcher.stop_token_ids)])
        return others if bool(others.any()) else allowed

    def _goes_on(self) -> bool:
        return bool(_without(self._allowed(), self._matcher.stop_token_ids).any())

    def _allowed(self) -> torch.Tensor:
        if self._bitmask is None:
            bitmask = xgrammar.allocate_token_bitmask(1, self._vocab_size)
            if self._dead or self._matcher.is_terminated():
                bitmask.zero_()
            else:
                self._matcher.fill_next_token_bitmask(bitmask)
            self._bitmask = bitmask[0]
        return self._bitmask


def _without(bitmask: torch.Tensor, token_ids: Iterable[int]) -> torch.Tensor:
    """A copy without some tokens, where there are any."""
    ids = torch.tensor(list(token_ids), dtype=torch.int64)
    if not len(ids):
        return bitmask
    cleared = bitmask.clone()
    for word, bit in zip((ids // 32).tolist(), (ids % 32).tolist(), strict=True):
        cleared[word] &= ~(1 << bit) if bit < 31 else 0x7FFFFFFF
    return cleared
