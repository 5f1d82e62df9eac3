"""KeyDiff (arXiv 2504.15364): keys that differ from the others matter; no attention weights are needed."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kvfold.methods.base import Facts
from kvfold.methods.held import HeldRows
from kvfold.methods.policy import Policy


@dataclass(frozen=True, kw_only=True)
class KeyDiff(Policy):
    """`keydiff(budget=1024)`: score = minus the cosine of a key and the mean of all keys' directions.

    Deviations: `sinks` and `recent` tokens stay (both 0 in the paper).
    """

    name: ClassVar[str] = "keydiff"
    facts: ClassVar[Facts] = Facts("tokens", "2504.15364", "sinks and recent tokens stay")
    scores_from: ClassVar[str] = "keys"
    query_aware: ClassVar[bool] = False

    def scores(self, held: HeldRows) -> Tensor:
        found = torch.zeros(held.shape)
        for layer in range(held.shape[0]):
            keys = normalize(held.rows(layer)[0], dim=-1)  # 0 where no token is
            anchor = normalize(keys.sum(1, keepdim=True), dim=-1)
            found[layer] = -(keys * anchor).sum(-1)
        return found
