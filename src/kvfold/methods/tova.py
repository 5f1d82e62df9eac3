"""TOVA (arXiv 2401.06104): the token that the newest query attends to least goes."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvfold.kv.staged import Watch
from kvfold.methods.base import Facts
from kvfold.methods.held import HeldRows
from kvfold.methods.policy import Policy


@dataclass(frozen=True, kw_only=True)
class Tova(Policy):
    """`tova(budget=1024)`: score = attention from the last query, averaged over all heads of the layer.

    Deviations: tokens are dropped every `every` generated tokens, by the last query before that, instead of one
    at each. After the first choice the heads of a layer hold the same tokens, as in the paper.
    """

    sinks: int = 0
    recent: int = 1

    name: ClassVar[str] = "tova"
    facts: ClassVar[Facts] = Facts("tokens", "2401.06104", "drops every 32 generated tokens")

    @property
    def watches(self) -> tuple[Watch, ...]:
        return (Watch(1),)

    def scores(self, held: HeldRows) -> Tensor:
        return held.mass(self.watches[0]).mean(1, keepdim=True).expand(held.shape)
