"""The picture of a plan: attainment against rate."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from kvfold.benchmark.plot import can_plot
from kvfold.planner.errors import PlacementError


def check_plot(path: Path) -> None:
    """Raises PlacementError where no plot can be drawn to `path`: before the search, not after it."""
    if not can_plot():
        raise PlacementError("--plot needs matplotlib; run: pip install 'kvfold[bench]'")
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise PlacementError(f"--plot {path} is no picture; give a file that ends in .png, .svg or .pdf")
    if not path.parent.is_dir():
        raise PlacementError(f"cannot write {path}: its folder does not exist; give another --plot")


def save_plot(curves: Mapping[str, Sequence[tuple[float, float]]], attainment: float, title: str, path: Path) -> None:
    """Draws (rate, attainment) of each placement. Raises PlacementError if the file cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for name, points in curves.items():
        axis.plot([rate for rate, _ in points], [share for _, share in points], marker="o", markersize=3, label=name)
    axis.axhline(attainment, color="gray", linestyle="--", linewidth=1)
    axis.set(
        title=title, xlabel="requests/s", ylabel="requests that meet TTFT and TPOT", xlim=(0, None), ylim=(0, 1.02)
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise PlacementError(f"cannot write {path}: {error.strerror}; give another --plot") from error
