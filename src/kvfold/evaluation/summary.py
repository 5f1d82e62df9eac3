"""From cells to what a reader wants to know: means with intervals, sizes, who is best, what has no place."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from kvfold.evaluation.bootstrap import Estimate, estimate
from kvfold.evaluation.measures import Measure, measures_of
from kvfold.evaluation.records import Cell, Manifest, Placement

BEST, TIED, OVER = "best", "tied", "over"
TOLERANCE = 1.05
"""Measured bits over budget up to which a family is ranked: what came after the context is held besides."""


@dataclass(frozen=True)
class Row:
    """A family at a budget in a task. methods: its member at each context length. planned: bits that it was given at
    the context's end, the largest of all lengths; bits, compression: measured when the answer had been read.
    values: mean of every measure; changes: difference to dense, or the value itself where a measure is one already.
    rank: BEST, TIED where the interval of the difference to the best has 0 in it, OVER where more bytes were held than
    the budget, which is then not ranked, or nothing.
    """

    task: str
    budget: float
    family: str
    methods: dict[int, str]
    planned: float
    bits: float
    compression: float
    values: dict[str, float]
    changes: dict[str, Estimate]
    rank: str = ""


@dataclass(frozen=True)
class Summary:
    """Of a whole folder. dense: means of the dense cache by task and measure; misfits: families without a place."""

    manifest: Manifest
    rows: list[Row]
    dense: dict[str, dict[str, float]]
    misfits: list[Placement]

    @property
    def query_aware(self) -> bool:
        return self.manifest.settings["query_aware"] == str(True)

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(row.task for row in self.rows))


def summarise(manifest: Manifest, cells: Sequence[Cell], plan: Sequence[Placement]) -> Summary:
    """cells: sorted by task, budget and family, as a folder gives them."""
    rows = []
    for (task, _), group in groupby(cells, key=lambda cell: (cell.task, cell.bits)):
        rows += _ranked(list(group), measures_of(task)[0])
    dense = {}
    for task, group in groupby(cells, key=lambda cell: cell.task):
        records = {(r.length, r.sample): r for cell in group for r in cell.dense}
        dense[task] = {m.name: mean([r.measures[m.name] for r in records.values()]) for m in measures_of(task)}
    return Summary(manifest, rows, dense, [p for p in plan if p.method is None])


def changes(cell: Cell, measure: Measure) -> Estimate:
    """A measure as it is told: against the dense cache where it is relative, sample by sample."""
    found = [r.measures[measure.name] for r in cell.records]
    if measure.relative:
        found = [value - r.measures[measure.name] for value, r in zip(found, cell.dense, strict=True)]
    return estimate(found)


def difference(a: Cell, b: Cell, measure: Measure) -> Estimate | None:
    """b - a over the samples that both have read; None where there are none."""
    of_a = {(r.length, r.sample): r.measures[measure.name] for r in a.records}
    found = [r.measures[measure.name] - of_a[r.length, r.sample] for r in b.records if (r.length, r.sample) in of_a]
    return estimate(found) if found else None


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _ranked(cells: list[Cell], measure: Measure) -> list[Row]:
    """The rows of a task and budget, best first."""
    made = [(cell, _row(cell)) for cell in cells]
    made.sort(key=lambda pair: (-1 if measure.higher else 1) * pair[1].values[measure.name])
    # Who has no place at some length is not compared: the others' mean would be over other samples.
    most = max(len(cell.records) for cell in cells)
    fair = [cell for cell, row in made if len(cell.records) == most and row.bits <= TOLERANCE * row.budget]
    rows = []
    for cell, row in made:
        rank = OVER if row.bits > TOLERANCE * row.budget else ""
        if cell in fair:
            apart = difference(fair[0], cell, measure)
            rank = BEST if cell is fair[0] else "" if apart is None or apart.differs else TIED
        rows.append(replace(row, rank=rank))
    return rows


def _row(cell: Cell) -> Row:
    measures = measures_of(cell.task)
    return Row(
        task=cell.task,
        budget=cell.bits,
        family=cell.family,
        methods={p.length: p.method for p in cell.placements if p.method is not None},
        planned=max(p.planned for p in cell.placements),
        bits=mean([16 * r.bytes / r.dense_bytes for r in cell.records]),
        compression=sum(r.dense_bytes for r in cell.records) / sum(r.bytes for r in cell.records),
        values={m.name: mean([r.measures[m.name] for r in cell.records]) for m in measures},
        changes={m.name: changes(cell, m) for m in measures},
    )
