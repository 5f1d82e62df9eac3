"""EMS (arXiv 2412.08521): evict, then merge what was evicted into what stays."""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import normalize

from kvfold.errors import ConfigError
from kvfold.kv.staged import Watch
from kvfold.methods.base import Facts
from kvfold.methods.choice import pooled
from kvfold.methods.held import HeldRows
from kvfold.methods.policy import Merge, Policy


@dataclass(frozen=True, kw_only=True)
class EMS(Policy):
    """`ems(budget=1024, similarity=0.6)`: score = mean attention over all queries that could see the token + mean
    attention of the last `window` queries, smoothed over `kernel` tokens. Dropped tokens whose key has a cosine of
    at least `similarity` with that of a token that stays are merged into the nearest one: keys and values become
    means weighted by the scores. How many are merged and how many only evicted so differs per head.

    Deviations: the paper's thresholds are not public; the cosine threshold is ours. Tokens that are coded already
    stay as they are; merging happens among those that are not.
    """

    window: int = 32
    kernel: int = 7
    similarity: float = 0.6

    name: ClassVar[str] = "ems"
    facts: ClassVar[Facts] = Facts("tokens; dropped ones live on in their neighbours", "2412.08521", "our threshold")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise ConfigError("ems needs window >= 1 and an odd kernel")
        if not -1 <= self.similarity <= 1:
            raise ConfigError(f"ems similarity={self.similarity} is no cosine; choose -1 to 1, such as 0.6")

    @property
    def watches(self) -> tuple[Watch, ...]:
        received = (Watch(renewed=False), Watch(self.window))
        return (*received, *(replace(watch, power=0) for watch in received))

    def scores(self, held: HeldRows) -> Tensor:
        return pooled(self._attention(held).masked_fill(held.newest(self.recent), 0), self.kernel, "avg")

    def merge(self, held: HeldRows, scores: Tensor, keep: Tensor) -> Merge | None:
        gone = held.valid & ~keep & (held.track == 0)
        goal = keep & (held.track == 0)
        if not gone.any():
            return None
        worth = self._attention(held).clamp(min=1e-12)

        def rows(layer: int) -> tuple[Tensor, Tensor]:
            keys, values = held.rows(layer)
            unit = normalize(keys, dim=-1)
            merged = keys.clone(), values.clone()
            for head in range(held.kv_heads):
                sources, goals = (m[layer, head].nonzero()[:, 0] for m in (gone, goal))
                if not len(sources) or not len(goals):
                    continue
                cosine, nearest = (unit[head, sources] @ unit[head, goals].T).max(-1)
                near = cosine >= self.similarity
                sources, into = sources[near], goals[nearest[near]]
                weight = worth[layer, head]
                total = weight.clone().index_add_(0, into, weight[sources])
                for side, new in zip((keys, values), merged, strict=True):
                    summed = side[head] * weight[:, None]
                    summed = summed.index_add(0, into, summed[sources])
                    new[head, goals] = (summed / total[:, None])[goals]
            return merged

        return rows

    def _attention(self, held: HeldRows) -> Tensor:
        # Powers of 0 count the queries (of all heads of the group) that could see the token.
        everything, local, able, near = (held.mass(watch) for watch in self.watches)
        return everything / able.clamp(min=1) + local / near.clamp(min=1)
