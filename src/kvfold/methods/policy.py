"""What token policies have in common: a budget, protected tokens, when they choose, and how a choice is made."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from kvfold.errors import ConfigError
from kvfold.kv.staged import Watch
from kvfold.kv.staged_tables import QueryRecord
from kvfold.methods.base import CacheShape, Facts
from kvfold.methods.held import HeldRows

Compress = Literal["prompt", "context"]
Merge = Callable[[int], tuple[Tensor, Tensor]]
DEFAULT_BUDGET = 1024


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Which tokens stay. A policy gives every held token a score; the highest stay, as many per head as `counts`
    says, after the first `sinks` and the newest `recent` ones, which always do.

    budget: tokens that a head keeps on average after an event, protected ones included: a whole number, or a
    share of the context as a float up to 1. compress: "prompt" chooses when the whole prompt is read (it sees the
    question: query-aware); "context" chooses at the end of what the request marks as context. every: generated
    tokens between two choices; so many may be held above the budget. Raises ConfigError for values out of range.
    """

    budget: int | float = DEFAULT_BUDGET
    sinks: int = 4
    recent: int = 32
    compress: str = "prompt"
    every: int = 32

    name: ClassVar[str]
    facts: ClassVar[Facts]
    knob: ClassVar[str | None] = "budget"
    drops: ClassVar[bool] = True
    scores_from: ClassVar[str] = "attention"  # what it looks at: for the table of facts
    query_aware: ClassVar[bool] = True  # whether the last queries of what was read sway the choice

    def __post_init__(self) -> None:
        check_budget(self.name, self.budget)
        if self.compress not in get_args(Compress):
            raise ConfigError(f"{self.name} compress={self.compress!r} is unknown; choose prompt or context")
        if self.sinks < 0 or self.recent < 0 or self.every < 1:
            raise ConfigError(f"{self.name} needs sinks >= 0, recent >= 0 and every >= 1")
        if isinstance(self.budget, int) and self.budget < self.least:
            raise ConfigError(
                f"{self.name} budget={self.budget} is below the {self.least} tokens that always stay "
                f"(sinks and recent); raise budget or lower them"
            )

    @property
    def uneven(self) -> bool:
        """Whether heads have budgets of their own."""
        return False

    @property
    def least(self) -> int:
        """Tokens that stay whatever the budget."""
        return max(1, self.sinks + self.recent)

    @property
    def chunk(self) -> int | None:
        """Prompt tokens between two choices before the context's end; None: there are none."""
        return None

    @property
    def tokens(self) -> int | float | None:
        """The budget for the layout; None where it cannot be told in advance."""
        return self.budget

    @property
    def watches(self) -> tuple[Watch, ...]:
        """What attention has to be added up."""
        return ()

    def records(self, shape: CacheShape) -> Mapping[str, Callable[[], QueryRecord]]:
        """What has to be recorded of the queries."""
        return {}

    def protected(self, held: HeldRows, budget: int) -> Tensor:
        """Tokens that stay, bool [layers, G, R]."""
        return held.first(self.sinks) | held.newest(self.recent)

    def scores(self, held: HeldRows) -> Tensor:
        """How much each token is worth, float32 [layers, G, R]. Values at no token do not matter."""
        raise NotImplementedError

    def counts(self, held: HeldRows, scores: Tensor, budget: int) -> Tensor:
        """Tokens that each head keeps, int64 [layers, G]; scores are infinite for protected tokens and -infinite
        where there is none."""
        return torch.full(held.shape[:2], budget)

    def merge(self, held: HeldRows, scores: Tensor, keep: Tensor) -> Merge | None:
        """Layer -> keys and values float32 [G, R, d] that replace those of tokens that stay uncompressed."""
        return None


def check_budget(name: str, budget: int | float) -> None:
    """Raises ConfigError unless it is a number of tokens or a share."""
    remedy = "give a number of tokens, or a share of the context such as 0.25"
    if isinstance(budget, int) and budget < 1:
        raise ConfigError(f"{name} budget={budget} keeps nothing; {remedy}")
    if isinstance(budget, float) and not 0 < budget <= 1:
        raise ConfigError(f"{name} budget={budget} is not a share between 0 and 1; {remedy}")


@dataclass(frozen=True, kw_only=True)
class Staged(Policy):
    """`staged`: keeps every token, and codes them when the prompt is read instead of while it is being read.

    This is how the papers' own code quantises: the prompt attends to itself uncompressed.
    """

    budget: int | float = 1.0
    sinks: int = 0
    recent: int = 0

    name: ClassVar[str] = "staged"
    facts: ClassVar[Facts] = Facts("nothing by itself: makes a codec wait for the prompt's end", "")
    knob: ClassVar[str | None] = None
    drops: ClassVar[bool] = False
    scores_from: ClassVar[str] = "nothing"
    query_aware: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget != 1.0 or self.sinks or self.recent:
            raise ConfigError("staged keeps every token; leave out budget, sinks and recent")

    @property
    def tokens(self) -> None:
        return None
