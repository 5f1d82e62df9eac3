"""DBudgetKV (arXiv 2502.16886, later ReFreeKV): prunes until attention would change, and so finds the budget itself."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from kvfold.errors import ConfigError
from kvfold.kv.staged import Watch
from kvfold.methods.base import Facts
from kvfold.methods.choice import ranked
from kvfold.methods.held import HeldRows
from kvfold.methods.policy import Policy

Rank = Literal["position", "attention"]


@dataclass(frozen=True, kw_only=True)
class DBudgetKV(Policy):
    """`dbudgetkv(threshold=0.01)`: drops tokens, least first, while the Frobenius norm of a head's attention matrix
    falls by no more than `threshold`. rank: "position" is the paper's order (first tokens, then the newest first);
    "attention" drops what was attended least first.

    Deviations: the norm is taken over the last `window` queries, whose attention stands for the matrix.
    """

    budget: int | float = 1.0
    threshold: float = 0.01
    rank: str = "position"
    window: int = 32

    name: ClassVar[str] = "dbudgetkv"
    facts: ClassVar[Facts] = Facts("tokens, as many as a head can spare", "2502.16886", "norm over the last queries")
    knob: ClassVar[str | None] = "threshold"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget != 1.0:
            raise ConfigError("dbudgetkv finds its budget itself; set threshold instead")
        if not 0 <= self.threshold < 1:
            raise ConfigError(f"dbudgetkv threshold={self.threshold} is out of range; 0.01 allows 1 % of the norm")
        if self.rank not in get_args(Rank):
            raise ConfigError(f"dbudgetkv rank={self.rank!r} is unknown; choose position or attention")
        if self.window < 1:
            raise ConfigError(f"dbudgetkv window={self.window} watches nothing; choose at least 1 query")

    @property
    def tokens(self) -> None:
        return None

    @property
    def watches(self) -> tuple[Watch, ...]:
        return (Watch(self.window, power=2),)

    def scores(self, held: HeldRows) -> Tensor:
        if self.rank == "position":
            return torch.arange(held.shape[2]).float().expand(held.shape).clone()
        return held.mass(self.watches[0])

    @property
    def uneven(self) -> bool:
        return True

    def counts(self, held: HeldRows, scores: Tensor, budget: int) -> Tensor:
        squares = held.mass(self.watches[0])
        order = ranked(scores)
        kept = squares.gather(-1, order).double().cumsum(-1)
        enough = (1 - self.threshold) ** 2 * kept[..., -1:]
        # As few tokens, best first, as hold that much of the squared norm.
        return (kept < enough).sum(-1) + 1
