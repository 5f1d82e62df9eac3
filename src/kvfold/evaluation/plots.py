"""Pictures of a suite: loss against bytes, and needles found by depth and length. PNG, as bytes."""

import importlib.util
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvfold.evaluation.bootstrap import growth
from kvfold.evaluation.errors import EvaluationError
from kvfold.evaluation.measures import AGREE, KL, SAME, Measure, measures_of
from kvfold.evaluation.pareto import pareto_front
from kvfold.evaluation.records import Cell, Record
from kvfold.evaluation.summary import Row, Summary, mean
from kvfold.evaluation.wording import heading

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 110
MARKERS = "osD^v<>PXph*"
LEAST = 1e-6
"""Nats that a divergence is drawn at where it is less: a logarithm has no 0."""


@dataclass(frozen=True)
class Picture:
    """A PNG; `alt` says in words what it shows."""

    name: str
    title: str
    alt: str
    png: bytes


def check_plots() -> None:
    """Raises EvaluationError where matplotlib is missing; does not import it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise EvaluationError("the report needs matplotlib; run: pip install 'kvfold[bench]'")


def loss_picture(summary: Summary, task: str) -> Picture:
    """Every measure of a task against the bits held, one line per family; the Pareto front of the first is ringed."""
    from matplotlib.figure import Figure

    rows = [row for row in summary.rows if row.task == task]
    shown = [m for m in measures_of(task) if m not in (AGREE, SAME)]
    front = _front(rows, shown[0])
    figure = Figure(figsize=(5.2 * len(shown), 5.2), layout="constrained")
    for axes, measure in zip(np.atleast_1d(figure.subplots(1, len(shown))), shown, strict=True):
        _curves(axes, rows, measure)
        if measure is shown[0]:
            points = [(row.bits, _height(row, measure)) for row in front]
            axes.plot(*zip(*points, strict=True), "o-", color="0.5", markersize=15, fillstyle="none", zorder=0)
    families = len({row.family for row in rows})
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, families), fontsize=8)
    best = ", ".join(f"{row.family} at {row.bits:.2f} bits" for row in front)
    alt = f"{heading(shown[0])} in task {task} against bits held, {families} families; on the Pareto front: {best}"
    return Picture(f"loss-{task}.png", f"Task {task}: loss against bits held", alt, _png(figure))


def needle_picture(cells: Sequence[Cell]) -> Picture:
    """Heat maps of all families at one budget and of the dense cache: probability of the answer by depth and length."""
    from matplotlib.figure import Figure

    # The geometric mean over the tokens of the right answer: what is left of it tells how much was lost.
    maps = {"dense": cells[0].dense} | {cell.family: cell.records for cell in cells}
    lengths = sorted({record.length for records in maps.values() for record in records})
    depths = sorted({record.tags["depth"] for records in maps.values() for record in records})
    columns = min(4, len(maps))
    figure = Figure(figsize=(3.4 * columns, 3.0 * math.ceil(len(maps) / columns)), layout="constrained")
    panels = np.atleast_1d(figure.subplots(math.ceil(len(maps) / columns), columns)).ravel()
    for axes in panels[len(maps) :]:
        axes.set_axis_off()
    for axes, (name, records) in zip(panels, maps.items(), strict=False):
        grid = [[_found(records, length, depth) for length in lengths] for depth in depths]
        image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_title(name, fontsize=8, wrap=True)
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        for y, row in enumerate(grid):
            for x, value in enumerate(row):
                if not math.isnan(value):
                    axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8,
                              color="black" if value > 0.6 else "white")  # fmt: skip
    panels[0].set(xlabel="context, tokens", ylabel="depth of the needle")
    figure.colorbar(image, ax=list(panels), label="probability per token")
    bits = cells[0].bits
    means = ", ".join(f"{name} {math.exp(-mean([r.measures['nll'] for r in rs])):.2f}" for name, rs in maps.items())
    alt = f"Probability of a needle's tokens by depth and context length at {bits:g} bits; over all of them: {means}"
    return Picture(f"needle-{bits:g}.png", f"Needle in a haystack at {bits:g} bits", alt, _png(figure))


def _curves(axes: "Axes", rows: Sequence[Row], measure: Measure) -> None:
    from matplotlib.ticker import PercentFormatter

    for index, family in enumerate(dict.fromkeys(sorted(row.family for row in rows))):
        own = sorted((row for row in rows if row.family == family), key=lambda row: row.bits)
        heights = [_height(row, measure) for row in own]
        errors = np.array([_errors(row, measure, height) for row, height in zip(own, heights, strict=True)]).T
        marker = MARKERS[index % len(MARKERS)]
        axes.errorbar([row.bits for row in own], heights, errors, marker=marker, label=family, capsize=2, lw=1)
    if measure is KL:
        axes.set_yscale("log")
    elif measure.unit != "nats":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    relative = " (change from dense)" if measure.relative else ""
    axes.set(xlabel="bits held per number of the dense cache", title=heading(measure) + relative)
    axes.grid(alpha=0.3, which="both")


def _height(row: Row, measure: Measure) -> float:
    change = row.changes[measure.name]
    if measure.unit == "perplexity":
        return growth(change).mean
    return max(change.mean, LEAST) if measure is KL else change.mean


def _errors(row: Row, measure: Measure, height: float) -> tuple[float, float]:
    change = row.changes[measure.name]
    if math.isnan(change.low):
        return 0.0, 0.0
    change = growth(change) if measure.unit == "perplexity" else change
    low = max(change.low, LEAST) if measure is KL else change.low
    return max(0.0, height - low), max(0.0, change.high - height)


def _front(rows: Sequence[Row], measure: Measure) -> list[Row]:
    return [rows[i] for i in pareto_front([(row.bits, _height(row, measure)) for row in rows])]


def _found(records: Sequence[Record], length: int, depth: float) -> float:
    there = [r.measures["nll"] for r in records if r.length == length and r.tags["depth"] == depth]
    return math.exp(-mean(there)) if there else math.nan


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
    return buffer.getvalue()
