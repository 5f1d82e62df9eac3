"""H2O (arXiv 2306.14048): heavy hitters, the tokens that have received most attention so far."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvfold.kv.staged import Watch
from kvfold.methods.base import Facts
from kvfold.methods.held import HeldRows
from kvfold.methods.policy import Policy


@dataclass(frozen=True, kw_only=True)
class H2O(Policy):
    """`h2o(budget=1024)`: attention added up over all queries; half of the budget goes to heavy hitters, half to
    the newest tokens.

    Deviations: weights are summed over a group's query heads; tokens are dropped every `every` generated tokens
    instead of one at each; `sinks` and `recent` are 0, the newest half being protected anyway.
    """

    sinks: int = 0
    recent: int = 0

    name: ClassVar[str] = "h2o"
    facts: ClassVar[Facts] = Facts("tokens", "2306.14048", "group sums, drops every 32 generated tokens")

    @property
    def watches(self) -> tuple[Watch, ...]:
        return (Watch(renewed=False),)

    def protected(self, held: HeldRows, budget: int) -> Tensor:
        return super().protected(held, budget) | held.newest(budget - budget // 2)

    def scores(self, held: HeldRows) -> Tensor:
        return held.mass(self.watches[0])
