"""The picture of a benchmark: distributions of TTFT and TPOT, and the run over time."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvfold.benchmark.errors import BenchmarkError
from kvfold.benchmark.outcome import Outcome
from kvfold.benchmark.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MISSING = "no plot is drawn because matplotlib is not installed; run: pip install 'kvfold[bench]'"
BINS = 60


def can_plot() -> bool:
    """Whether matplotlib is installed, without importing it."""
    return importlib.util.find_spec("matplotlib") is not None


def save_plot(report: Report, path: Path) -> None:
    """Draw all runs over each other into a PNG. Raises BenchmarkError if it cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots(2, 2)
    figure.suptitle(report.title, fontsize=10)
    for run in report.runs:
        _cdf(axes[0, 0], [1000 * o.ttft for o in run.outcomes if o.succeeded and o.ttft is not None], run.name)
        _cdf(axes[0, 1], [1000 * o.tpot for o in run.outcomes if o.tpot is not None], run.name)
        _in_flight(axes[1, 0], run.outcomes, run.name)
        _throughput(axes[1, 1], run.outcomes, run.summary.duration, run.name)
    for axis, title, x, y in (
        (axes[0, 0], "time to first token", "ms", "share of requests"),
        (axes[0, 1], "time per output token", "ms", "share of requests"),
        (axes[1, 0], "requests scheduled and not ended", "s", "requests"),
        (axes[1, 1], "output", "s", "chunks/s"),
    ):
        axis.set(title=title, xlabel=x, ylabel=y, ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise BenchmarkError(f"cannot write {path}: {error.strerror}; give another --out") from error


def _cdf(axis: "Axes", values: Sequence[float], name: str) -> None:
    ordered = sorted(values)
    shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
    axis.step([ordered[0], *ordered] if ordered else [], [0.0, *shares] if ordered else [], where="post", label=name)


def _in_flight(axis: "Axes", outcomes: Sequence[Outcome], name: str) -> None:
    steps = [(o.scheduled, 1) for o in outcomes]
    steps += [(o.ended, -1) for o in outcomes if o.ended is not None]
    times, counts, running = [0.0], [0], 0
    for time, step in sorted(steps):
        running += step
        times.append(time)
        counts.append(running)
    axis.step(times, counts, where="post", label=name)


def _throughput(axis: "Axes", outcomes: Sequence[Outcome], duration: float, name: str) -> None:
    if duration <= 0:
        return
    width = duration / BINS
    counts = [0] * BINS
    for outcome in outcomes:
        for time in outcome.arrivals:
            counts[min(BINS - 1, int(time / width))] += 1
    axis.step([i * width for i in range(BINS)], [count / width for count in counts], where="post", label=name)
