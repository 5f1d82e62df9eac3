"""From repetitions to figures: medians, spreads, ratios to the best peer."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.peers.measure import Row

OURS = "kvfold"


@dataclass(frozen=True)
class Figures:
    """median, low and high: tokens/s over the repetitions. ratio: median over that of the cell's best peer; None where
    no peer was measured. step: median seconds of a decode step. Bytes are the largest seen."""

    row: Row
    median: float
    low: float
    high: float
    ratio: float | None
    peak_rss: int
    kv_bytes: int
    step: float | None
    held: float | None  # tokens in the cache, of all sequences, in the mean of a repetition

    @property
    def weight_bytes(self) -> int:
        return int(self.row.about["weight_bytes"])


def figures(rows: Sequence[Row]) -> list[Figures]:
    """Of all rows that have samples, cell by cell in their order."""
    measured = [row for row in rows if row.samples]
    best: dict[str, float] = {}
    for row in measured:
        if row.configuration.peer != OURS:
            best[row.cell.name] = max(best.get(row.cell.name, 0.0), _median(row, "tokens_per_s"))
    return [_figures(row, best.get(row.cell.name)) for row in measured]


def _figures(row: Row, best: float | None) -> Figures:
    rates = [sample["tokens_per_s"] for sample in row.samples]
    median = statistics.median(rates)
    decodes = row.cell.kind == "decode"
    return Figures(
        row,
        median,
        min(rates),
        max(rates),
        median / best if best else None,
        max(sample["peak_rss"] for sample in row.samples),
        max(sample["kv_bytes"] for sample in row.samples),
        statistics.median(s["seconds"] / s["steps"] for s in row.samples) if decodes else None,
        statistics.mean(s["held"] for s in row.samples) if decodes else None,
    )


def _median(row: Row, name: str) -> float:
    return statistics.median(sample[name] for sample in row.samples)
