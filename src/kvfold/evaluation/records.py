"""What a suite keeps: one record per sample and method, one cell per family, budget and task."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvfold.evaluation.solver import Fit, Misfit


@dataclass(frozen=True)
class Record:
    """One sample read through one method. measures: by name, all finite; said: what the model answered.

    bytes: held when the answer had been read, everything counted; dense_bytes: what a dense 16-bit cache takes then.
    """

    length: int
    sample: int
    method: str
    measures: dict[str, float]
    said: str
    bytes: int
    dense_bytes: int
    tags: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Placement:
    """A family's member at a budget (`bits` of 16 per number of the dense cache) and context length in tokens:
    a method string and the bits that it is predicted to hold at the context's end, or the reason why there is none."""

    family: str
    bits: float
    length: int
    method: str | None
    planned: float = 0.0
    reason: str = ""

    @classmethod
    def of(cls, family: str, bits: float, length: int, dense_bytes: int, found: Fit | Misfit) -> "Placement":
        if isinstance(found, Misfit):
            return cls(family, bits, length, None, reason=found.reason)
        return cls(family, bits, length, found.method, 16 * found.bytes / dense_bytes)


@dataclass(frozen=True)
class Cell:
    """A family at a budget in a task, over all context lengths that it fits; `dense[i]` is the dense cache's record
    of the sample of `records[i]`. placements: one per length, those without a place too."""

    family: str
    bits: float
    task: str
    placements: list[Placement]
    records: list[Record]
    dense: list[Record]


@dataclass(frozen=True)
class Manifest:
    """What all cells of a folder have in common. settings: by name, what the figures depend on; samples: digest of
    the token ids of each task's samples, by `task/length`."""

    kvfold: str
    model: str
    fingerprint: str
    settings: dict[str, str]
    samples: dict[str, str]
