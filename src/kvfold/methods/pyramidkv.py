"""PyramidKV (arXiv 2406.02069): SnapKV with more tokens in the lower layers, fewer in the upper ones."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvfold.errors import ConfigError
from kvfold.methods.base import Facts
from kvfold.methods.held import HeldRows
from kvfold.methods.snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """`pyramidkv(budget=1024)`: layer budgets fall linearly from 2 B - B/beta to B/beta, B being what the budget
    leaves beside the protected tokens; where the first layers have fewer tokens than that, the others get more.

    Deviations: those of SnapKV; layers with a sliding window take no part.
    """

    beta: float = 20.0

    name: ClassVar[str] = "pyramidkv"
    facts: ClassVar[Facts] = Facts("tokens, more in upper layers", "2406.02069", "those of snapkv")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 1:
            raise ConfigError(f"pyramidkv beta={self.beta} is out of range; choose at least 1")

    @property
    def uneven(self) -> bool:
        return True

    def counts(self, held: HeldRows, scores: Tensor, budget: int) -> Tensor:
        layers = held.shape[0]
        free = budget - self.least
        most = min(2 * free - free / self.beta, int(held.counts.max()) - self.least)
        most = max(most, free) if layers > 1 else free
        steps = torch.linspace(most, 2 * free - most, layers, dtype=torch.float64)
        # Rounded so that the layers' sum is what the budget allows.
        total = steps.cumsum(0).round()
        each = self.least + torch.diff(total, prepend=total.new_zeros(1))
        return each.long()[:, None].expand(held.shape[:2])
