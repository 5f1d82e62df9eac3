"""What the sampler must know of one sequence: its parameters, its tokens and its own random draws."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from kvfold.engine.params import SamplingParams

if TYPE_CHECKING:  # xgrammar is read only where a request has a grammar
    from kvfold.engine.grammar_state import GrammarState


@dataclass
class RowState:
    """One completion as the sampler sees it; the engine keeps one per completion for its whole life.

    The random number for a token depends on `draw_key` and on how many tokens came before it, on nothing
    else: not on the batch, nor on whether the sequence was preempted and resumed in between.

    Attributes:
        params: the request's parameters.
        prompt_token_ids: the prompt, for the repetition penalty.
        output_token_ids: tokens generated so far. The engine's own list: the engine appends to it after each
            step, the sampler only reads it.
        stop_ids: token ids that would end the sequence, masked until `min_tokens` are generated.
        draw_key: what seeds the draws.
        grammar: where the sequence stands in the grammar it must follow; None where it is free.
    """

    params: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: list[int]
    stop_ids: frozenset[int]
    draw_key: bytes
    grammar: "GrammarState | None" = None
    _prompt_seen: torch.Tensor | None = field(default=None, init=False, repr=False)
    _output_counts: torch.Tensor | None = field(default=None, init=False, repr=False)
    _counted: int = field(default=0, init=False, repr=False)

    @classmethod
    def create(
        cls,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        *,
        output_token_ids: list[int] | None = None,
        eos_token_ids: Iterable[int] = (),
        request_id: str = "",
        index: int = 0,
        engine_seed: int = 0,
        grammar: "GrammarState | None" = None,
    ) -> "RowState":
        """State of completion `index` of a request; with `params.seed` set, `request_id` does not matter."""
        eos = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        source = f"request:{params.seed}" if params.seed is not None else f"engine:{engine_seed}:{request_id}"
        return cls(
            params=params,
            prompt_token_ids=prompt_token_ids,
            output_token_ids=[] if output_token_ids is None else output_token_ids,
            stop_ids=eos | params.stop_ids,
            draw_key=hashlib.blake2b(f"{source}:{index}".encode(), digest_size=16).digest(),
            grammar=grammar,
        )

    @property
    def below_min_tokens(self) -> bool:
        """True while the sequence must not end yet."""
        return len(self.output_token_ids) < self.params.min_tokens

    @property
    def grammar_ended(self) -> bool:
        """True where the output so far is complete and its grammar lets nothing follow."""
        if self.grammar is None:
            return False
        self.grammar.follow(self.output_token_ids)
        return self.grammar.ended

    def grammar_mask(self) -> torch.Tensor | None:
        """Tokens that the grammar lets follow now, a bit each: int32 [ceil(V / 32)] on the CPU; None without one.

        Tokens that may not end the sequence are left out as long as there are others.
        """
        if self.grammar is None:
            return None
        self.grammar.follow(self.output_token_ids)
        return self.grammar.allowed(self.stop_ids if self.below_min_tokens else (), eos=not self.params.ignore_eos)

    def uniform(self) -> float:
        """The draw for the next token, uniform in [0, 1): a counter-based generator, so it has no state."""
        position = len(self.output_token_ids).to_bytes(8, "little")
        digest = hashlib.blake2b(position, key=self.draw_key, digest_size=8).digest()
        # 52 bits rather than 53: then u * total < total holds after rounding too, for every positive total.
        return (int.from_bytes(digest, "little") >> 12) * 2.0**-52

    def output_counts(self, vocab_size: int, device: torch.device) -> torch.Tensor:
        """How often each token was generated: int32 [vocab_size], kept between steps, not to be changed."""
        counts = self._output_counts
        stale = counts is None or counts.device != device or self._counted > len(self.output_token_ids)
        if counts is None or stale:
            counts = torch.zeros(vocab_size, dtype=torch.int32, device=device)
            self._output_counts, self._counted = counts, 0
        new = self.output_token_ids[self._counted :]
        if new:
            ids = torch.tensor(new, dtype=torch.int64, device=device)
            counts.index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
            self._counted += len(new)
        return counts

    def prompt_seen(self, vocab_size: int, device: torch.device) -> torch.Tensor:
        """Which tokens the prompt has: bool [vocab_size], kept between steps and not to be changed."""
        seen = self._prompt_seen
        if seen is None or seen.device != device:
            seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            seen[torch.tensor(self.prompt_token_ids, dtype=torch.int64, device=device)] = True
            self._prompt_seen = seen
        return seen
