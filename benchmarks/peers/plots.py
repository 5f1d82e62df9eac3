"""The pictures of a run, as PNG: throughput, step time against the bytes that a step reads, memory."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.peers.summary import OURS, Figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 110
MARKERS = "osD^v<>PXph*"
COLOURS = [f"C{index}" for index in range(10)] + ["black", "gold", "navy", "lime"]
Point = Callable[[Figures], tuple[float, float]]


def draw(found: Sequence[Figures], bandwidth: float, folder: Path) -> list[str]:
    """Writes all pictures that the figures have something for and returns their names. bandwidth: bytes per second."""
    decodes = [each for each in found if each.row.cell.kind == "decode"]
    if not decodes:
        return []
    _throughput(decodes, "context", "batch", folder / "throughput-context.png")
    _throughput(decodes, "batch", "context", folder / "throughput-batch.png")
    _roofline(decodes, bandwidth, folder / "roofline.png")
    _memory(decodes, folder / "memory.png")
    return ["throughput-context.png", "throughput-batch.png", "roofline.png", "memory.png"]


def _throughput(found: Sequence[Figures], along: str, fixed: str, file: Path) -> None:
    """A panel for each value of `fixed` that has several values of `along` (or for all, if none has)."""
    values = sorted({getattr(each.row.cell, fixed) for each in found})
    panels = {v: [each for each in found if getattr(each.row.cell, fixed) == v] for v in values}
    several = {v: own for v, own in panels.items() if len({each.row.cell.name for each in own}) > 1} or panels
    grid = _grid(len(several))
    for axes, (value, own) in zip(grid, several.items(), strict=True):
        _lines(axes, own, lambda each: (getattr(each.row.cell, along), each.median), spread=True)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks := sorted({getattr(each.row.cell, along) for each in own}), [str(t) for t in ticks])
        axes.set(title=f"decode, {fixed} {value}", xlabel=along, ylabel="tokens/s", ylim=(0, None))
    _save(grid, file)


def _roofline(found: Sequence[Figures], bandwidth: float, file: Path) -> None:
    """Time of a step against the weights and KV bytes it reads at least; below the line memory is not fast enough."""
    from matplotlib.ticker import LogLocator, NullFormatter

    (axes,) = grid = _grid(1)
    _lines(axes, found, lambda each: (_read(each) / 1e6, 1000 * (each.step or 0)), joined=False)
    ends = np.array([0.8 * min(map(_read, found)), 1.25 * max(map(_read, found))])
    axes.plot(ends / 1e6, 1000 * ends / bandwidth, "k--", lw=1, label=f"memory, {bandwidth / 1e9:.1f} GB/s")
    axes.set(title="decode step", xlabel="weights + held KV, MB", ylabel="ms", xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(NullFormatter())
    _save(grid, file)


def _memory(found: Sequence[Figures], file: Path) -> None:
    grid = _grid(2)
    _lines(grid[0], found, lambda each: (each.held or 0, each.kv_bytes / 2**20))
    _lines(grid[1], found, lambda each: (each.held or 0, each.peak_rss / 2**20))
    for axes, title in zip(grid, ("held KV", "peak resident memory"), strict=True):
        axes.set(title=title, xlabel="tokens held", ylabel="MiB", ylim=(0, None))
    _save(grid, file)


def _read(figures: Figures) -> int:
    return figures.weight_bytes + figures.kv_bytes


def _lines(axes: "Axes", found: Sequence[Figures], point: Point, *, spread: bool = False, joined: bool = True) -> None:
    for index, name in enumerate(dict.fromkeys(each.row.configuration.name for each in found)):
        own = sorted((each for each in found if each.row.configuration.name == name), key=point)
        x, y = np.array([point(each) for each in own]).T
        errors = [[each.median - each.low for each in own], [each.high - each.median for each in own]]
        ours = own[0].row.configuration.peer == OURS
        width, size = (2, 7) if ours else (1, 5)
        style = {"marker": MARKERS[index % len(MARKERS)], "color": COLOURS[index % len(COLOURS)]}
        style |= {"linewidth": width * joined, "markersize": size}
        axes.errorbar(x, y, errors if spread else None, label=name, capsize=2, **style)
    axes.grid(alpha=0.3, which="both")


def _grid(panels: int) -> list["Axes"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * panels, 5.4), layout="constrained")
    return list(np.atleast_1d(figure.subplots(1, panels)))


def _save(grid: Sequence["Axes"], file: Path) -> None:
    figure = grid[0].figure
    labelled = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        labelled.values(), labelled.keys(), loc="outside lower center", ncols=min(3, 1 + len(grid)), fontsize=8
    )
    figure.savefig(file, dpi=DPI, facecolor="white")
