"""Batch-Max (arXiv 2412.05693): the policy chooses while the prompt is being read, so that the peak is small, too."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from kvfold.errors import ConfigError
from kvfold.kv.staged import Watch
from kvfold.kv.staged_tables import QueryRecord
from kvfold.methods.base import CacheShape, Facts
from kvfold.methods.held import HeldRows
from kvfold.methods.policy import Merge, Policy
from kvfold.methods.snapkv import SnapKV

SHARED = ("budget", "sinks", "recent", "compress", "every")


@dataclass(frozen=True, kw_only=True)
class BatchMax(Policy):
    """`batchmax(policy="snapkv", budget=1024, chunk=512)`: after every `chunk` prompt tokens the policy chooses, from
    what it kept before and the chunk, by what the chunk's last queries look at; the rest is gone before the next
    chunk is read. A prompt never takes more than budget + chunk tokens, and is admitted by that.

    Parameters that are not given are those of the policy. Deviation: the paper's score is not public, so any policy
    serves, snapkv by default.
    """

    policy: str = "snapkv"
    chunk: int = 512
    inner: Policy = field(default_factory=SnapKV, repr=False, metadata={"parameter": False})

    name: ClassVar[str] = "batchmax"
    facts: ClassVar[Facts] = Facts("tokens, already while the prompt is read", "2412.05693", "any policy's score")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk < 1:
            raise ConfigError(f"batchmax chunk={self.chunk} is out of range; choose at least 1 token")
        if self.inner.tokens is None:
            raise ConfigError(
                f"{self.inner.name} finds its budget while it runs, batchmax needs one; choose another policy"
            )

    @classmethod
    def around(cls, inner: Policy, arguments: Mapping[str, Any]) -> "BatchMax":
        """arguments: the parameters that were given. Raises ConfigError for values out of range."""
        given = {name: arguments[name] for name in SHARED if name in arguments}
        inner = replace(inner, **given)
        shared = {name: getattr(inner, name) for name in SHARED}
        return cls(**{**arguments, **shared}, inner=inner)

    @property
    def uneven(self) -> bool:
        return self.inner.uneven

    @property
    def watches(self) -> tuple[Watch, ...]:
        return self.inner.watches

    def records(self, shape: CacheShape) -> Mapping[str, Callable[[], QueryRecord]]:
        return self.inner.records(shape)

    def protected(self, held: HeldRows, budget: int) -> Tensor:
        return self.inner.protected(held, budget)

    def scores(self, held: HeldRows) -> Tensor:
        return self.inner.scores(held)

    def counts(self, held: HeldRows, scores: Tensor, budget: int) -> Tensor:
        return self.inner.counts(held, scores, budget)

    def merge(self, held: HeldRows, scores: Tensor, keep: Tensor) -> Merge | None:
        return self.inner.merge(held, scores, keep)
