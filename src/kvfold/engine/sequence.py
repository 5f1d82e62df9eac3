"""Requests and their sequences: one progress variable, `tables.length`, catches up with the number of tokens."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import Tensor

from kvfold.engine.completion import Completion
from kvfold.engine.detokenizer import TokenDecoder
from kvfold.engine.outputs import Logprob, RequestMetrics
from kvfold.engine.params import SamplingParams
from kvfold.engine.row_state import RowState
from kvfold.kv.staged_tables import StagedTables
from kvfold.kv.tables import PageTables


@dataclass(frozen=True)
class LogitsTap:
    """`receive` is called with (first position p, logits float32 [n, V]) for all prompt positions from `start` on,
    in order; the logits at p predict token p + 1. After preemption positions may come twice."""

    start: int
    receive: Callable[[int, Tensor], None]


@dataclass(eq=False)
class Request:
    """What a user asked for: a prompt, parameters, a lane (compression method) and `params.n` sequences.

    context: how many of the prompt's tokens are read before a staged method compresses them. handover: after its first
    token it goes on in another engine.
    """

    id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    lane: int
    metrics: RequestMetrics
    context: int
    tap: LogitsTap | None = None
    handover: bool = False
    sequences: list["Sequence"] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @property
    def finished(self) -> bool:
        return all(s.output.finished for s in self.sequences)


class Sequence(Completion):
    """One completion of a request. `tables` is None while it waits; `tables.length` tokens are computed.

    Others as in `Completion`.
    """

    def __init__(self, request: Request, row: RowState, tokenizer: TokenDecoder, limit: int, index: int) -> None:
        super().__init__(row, tokenizer, limit, index)
        self.request = request
        self.tables: PageTables | StagedTables | None = None
        self.kv_bytes = 0  # held when it ended
        self.kv_tokens = 0

    @property
    def tokens(self) -> list[int]:
        return self.request.prompt_token_ids + self.output.token_ids

    def tokens_from(self, start: int, count: int) -> list[int]:
        """`count` tokens from position `start` on."""
        prompt = self.request.prompt_token_ids
        if start >= len(prompt):
            return self.output.token_ids[start - len(prompt) : start - len(prompt) + count]
        return prompt[start : start + count] + self.output.token_ids[: max(0, start + count - len(prompt))]

    def resume(self, said: Iterable[int] | None) -> bool:
        """Goes on after these tokens of another engine (None: it ended there). False where nothing is left to say."""
        if said is None:
            self.output.finish_reason = "handover"
            return False
        for token in said:
            self.output.token_ids.append(token)
            self.detokenizer.push(token)
        self.output.text = self.detokenizer.text
        return True

    @property
    def forks(self) -> int:
        """Sequences that it stands for: the first of `n` is all of them until it has computed the prompt."""
        return self.request.params.n if self.output.index == 0 and not self.output.token_ids else 1

    @property
    def computed(self) -> int:
        return 0 if self.tables is None else self.tables.length

    @property
    def held(self) -> PageTables | StagedTables:
        """The tables of a running sequence."""
        assert self.tables is not None, "only running sequences hold tables"
        return self.tables
