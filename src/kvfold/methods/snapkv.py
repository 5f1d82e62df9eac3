"""SnapKV (arXiv 2404.14469): what the last queries of the prompt look at is what the answer will look at."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from kvfold.errors import ConfigError
from kvfold.kv.staged import Watch
from kvfold.methods.base import Facts
from kvfold.methods.choice import pooled
from kvfold.methods.held import HeldRows
from kvfold.methods.policy import Policy

Pool = Literal["avg", "max"]


@dataclass(frozen=True, kw_only=True)
class SnapKV(Policy):
    """`snapkv(budget=1024)`: score = attention from the last `window` queries, smoothed over `kernel` tokens.

    Deviations: weights are summed over a group's query heads before smoothing and ranking (the paper ranks per
    query head); the first `sinks` tokens stay (sinks=0 is the paper); generated tokens are chosen from, too, every
    `every` tokens, where the paper keeps them all.
    """

    window: int = 32
    kernel: int = 5
    pool: str = "avg"

    name: ClassVar[str] = "snapkv"
    facts: ClassVar[Facts] = Facts(
        "tokens", "2404.14469", "group sums before ranking, sinks stay, generated tokens are chosen from too"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ConfigError(f"{self.name} window={self.window} watches nothing; choose at least 1 query")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ConfigError(f"{self.name} kernel={self.kernel} has no middle; choose an odd number of tokens")
        if self.pool not in get_args(Pool):
            raise ConfigError(f"{self.name} pool={self.pool!r} is unknown; choose avg or max")

    @property
    def watches(self) -> tuple[Watch, ...]:
        return (Watch(self.window),)

    def scores(self, held: HeldRows) -> Tensor:
        # The newest tokens stay anyway; their mutual attention must not lift their older neighbours.
        mass = held.mass(self.watches[0]).masked_fill(held.newest(self.recent), 0)
        return pooled(mass, self.kernel, self.pool)
