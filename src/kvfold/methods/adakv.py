"""Ada-KV (arXiv 2407.11550): the heads of a layer share its budget by where the attention is."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvfold.errors import ConfigError
from kvfold.methods.base import Facts
from kvfold.methods.choice import ranked
from kvfold.methods.held import HeldRows
from kvfold.methods.snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class AdaKV(SnapKV):
    """`adakv(budget=1024, alpha=0.2)`: of the best G x B tokens of a layer, count per head; a head keeps
    (1 - alpha) x count + alpha x B tokens, B being the budget beside the protected tokens.

    Deviations: those of SnapKV.
    """

    kernel: int = 7
    pool: str = "max"
    alpha: float = 0.2

    name: ClassVar[str] = "adakv"
    facts: ClassVar[Facts] = Facts("tokens, heads of a layer unequally", "2407.11550", "those of snapkv")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"adakv alpha={self.alpha} is out of range; choose 0 (all adaptive) to 1 (all equal)")

    @property
    def uneven(self) -> bool:
        return True

    def counts(self, held: HeldRows, scores: Tensor, budget: int) -> Tensor:
        layers, heads, width = held.shape
        best = ranked(scores.flatten(1))[:, : heads * budget]
        chosen = scores.new_zeros(layers, heads * width).scatter_(1, best, 1.0).view(layers, heads, width)
        shares = chosen.sum(-1)
        kept = ((1 - self.alpha) * shares + self.alpha * budget).floor().long()
        # What rounding left over goes to the first heads, one token each.
        left = heads * budget - kept.sum(1, keepdim=True)
        return kept + (held.counts.new_ones(heads).cumsum(0) <= left)
