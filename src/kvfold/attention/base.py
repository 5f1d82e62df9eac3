"""The contract between the engine and whoever computes attention over pages."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from kvfold.kv.layout import CacheLayout
from kvfold.kv.pool import PagePool
from kvfold.kv.staged import StagedLayout
from kvfold.kv.staged_tables import StagedTables
from kvfold.kv.tables import PageTables

AnyTables = TypeVar("AnyTables", PageTables, StagedTables)


@dataclass(frozen=True)
class SequenceStep(Generic[AnyTables]):
    """`count` new tokens of one sequence, rows [first, first + count) of the batch's flattened tokens.

    `tables.length` is the position of the first of them; pages for all of them are reserved.
    """

    tables: AnyTables
    first: int
    count: int


class Plan(Protocol):
    """One engine step of one lane: everything that is the same for all layers, prepared once."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Seals and stores the new keys and values of one layer, then attends.

        q: [T, H, d], k and v: [T, G, d], the lane's tokens in the order of its steps, after RoPE and the method's
        maps. Returns the output [T, H, d] in q's dtype and the log-sum-exp of the scores, float32 [T, H].
        A query at position t sees positions <= t inside its layer's window: those below `layout.sealed(t + 1)`
        and beyond the sinks as sealed codes, the others as near pages give them back. Under a staged layout it sees
        what the tracks hold and the new tokens up to itself.
        Writes only to pages that the steps' tables reserved; each layer is to be called once per plan.
        """
        ...


class AttentionBackend(Protocol):
    def plan(
        self, pool: PagePool, layout: CacheLayout | StagedLayout, steps: Sequence[SequenceStep[Any]], scale: float
    ) -> Plan:
        """Prepares one step of sequences whose tables are of this layout.

        scale: multiplies the scores, 1 / sqrt(d) of the original d for most models.
        """
        ...
