"""Who has which tokens and heads: arithmetic that every rank does for itself, so that no sizes are ever sent."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kvfold.kv.layout import CacheLayout
from kvfold.parallel.errors import ParallelError

Variant = Literal["ulysses", "ring"]
VARIANTS: tuple[Variant, ...] = ("ulysses", "ring")
Positions = NDArray[np.int64]


@dataclass(frozen=True)
class Units:
    """Sealed units [first, last): unit u holds the positions from sinks + u * seal on, `seal` of them."""

    first: int
    last: int

    def __len__(self) -> int:
        return max(0, self.last - self.first)


@dataclass(frozen=True)
class Split:
    """A prompt of `length` tokens over `ranks` ranks.

    spans: of each rank, the ranges [a, b) of positions that it computes, ascending and not empty. They begin where a
    unit does, so that every sealed unit has all its rows on one rank. The last token is rank 0's, which goes on from
    there. heads: of each rank, the KV heads whose far rows it holds (ring: all of them, everywhere).
    """

    layout: CacheLayout
    variant: Variant
    length: int
    spans: tuple[tuple[tuple[int, int], ...], ...]
    heads: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, layout: CacheLayout, variant: Variant, ranks: int, length: int) -> "Split":
        """Ring: 2 N pieces, rank i having the i-th from both ends, so that all have as many keys to look at.
        Ulysses: N pieces, and KV heads as equally as they come."""
        pieces = 2 * ranks if variant == "ring" else ranks
        cuts = [_aligned(layout, length * i // pieces) for i in range(pieces)] + [length]
        ranges = list(pairwise(cuts))
        if variant == "ring":
            owned = [[ranges[i], ranges[-1 - i]] for i in range(ranks)]
        else:
            owned = [[ranges[-1 - i]] for i in range(ranks)]
        spans = tuple(tuple((a, b) for a, b in own if a < b) for own in owned)
        return cls(layout, variant, length, spans, shared_heads(layout.kv_heads, variant, ranks))

    @property
    def ranks(self) -> int:
        return len(self.spans)

    @cached_property
    def positions(self) -> list[Positions]:
        """Of each rank, ascending."""
        return [_joined([np.arange(a, b) for a, b in spans]) for spans in self.spans]

    @cached_property
    def asking(self) -> list[int]:
        """Of each rank, how many of its queries see sealed rows: the last ones of its positions."""
        sealed = [np.array([self.layout.sealed(int(t) + 1) for t in own], np.int64) for own in self.positions]
        return [int((own > self.far_start).sum()) for own in sealed]

    @property
    def far_start(self) -> int:
        """Position of the first row that is ever sealed."""
        return self.layout.sinks

    def units(self, rank: int) -> list[Units]:
        """What a rank seals, of each of its spans."""
        layout, end = self.layout, self.layout.sealed(self.length)
        found = []
        for a, b in self.spans[rank]:
            low, high = max(a, layout.sinks), min(b, end)
            first = (low - layout.sinks) // layout.seal
            found.append(Units(first, max(first, (high - layout.sinks) // layout.seal)))
        return found

    @cached_property
    def borrowed(self) -> list[Positions]:
        """Of each rank, the positions of others whose rows its queries see in 16 bits: the sinks, and what is recent
        where a span of it begins."""
        layout, found = self.layout, []
        for own, spans in zip(self.positions, self.spans, strict=True):
            near = [np.arange(min(layout.sinks, a)) for a, _ in spans]
            near += [np.arange(max(layout.sinks, layout.sealed(a + 1)), a) for a, _ in spans]
            found.append(np.setdiff1d(_joined(near), own))
        return found

    def lent(self, source: int, target: int) -> Positions:
        """Positions whose rows rank `source` lends to rank `target`."""
        shared: Positions = np.intersect1d(self.positions[source], self.borrowed[target])
        return shared

    def sees(self, rank: int, units: Units, window: int | None) -> bool:
        """Whether any query of a rank sees any row of the units."""
        if not len(units):
            return False
        layout = self.layout
        first, last = layout.sinks + units.first * layout.seal, layout.sinks + units.last * layout.seal
        for a, b in self.spans[rank]:
            # The newest query sees the most rows behind it, the oldest one that sees the unit reaches back furthest.
            oldest = max(a, first)
            if layout.sealed(b) > first and (window is None or oldest - window < last):
                return True
        return False

    def unit_owner(self, unit: int) -> int:
        """The rank that keeps a unit sealed after the prompt (ring; with ulysses all ranks do, their heads of it)."""
        return unit % self.ranks


def shared_heads(kv_heads: int, variant: Variant, ranks: int) -> tuple[tuple[int, ...], ...]:
    """KV heads of each rank. Raises ParallelError where they are to be shared out and there are too few."""
    if variant == "ring":
        return (tuple(range(kv_heads)),) * ranks
    if kv_heads < ranks:
        raise ParallelError(
            f"ulysses shares out KV heads and this model has {kv_heads} for {ranks} ranks; "
            f"use the ring variant or at most {kv_heads} ranks"
        )
    cuts = [-(-kv_heads * i // ranks) for i in range(ranks + 1)]
    return tuple(tuple(range(a, b)) for a, b in pairwise(cuts))


def _aligned(layout: CacheLayout, position: int) -> int:
    """The last position up to this one at which a unit begins, or 0."""
    return max(0, position - (position - layout.sinks) % layout.seal) if position > layout.sinks else 0


def _joined(parts: Sequence[Positions]) -> Positions:
    return np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64)
