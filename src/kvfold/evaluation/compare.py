"""Two suites, or two cells, against each other: paired differences, and who is better."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvfold.evaluation.bootstrap import Estimate
from kvfold.evaluation.errors import EvaluationError
from kvfold.evaluation.folder import Folder, check_same, read
from kvfold.evaluation.measures import Measure, measures_of
from kvfold.evaluation.records import Cell, Manifest
from kvfold.evaluation.summary import difference

DIFFERENT_ON_PURPOSE = ("calibration", "dtype")
"""Settings that two suites may be compared over: the samples are the same."""


@dataclass(frozen=True)
class Comparison:
    """b - a of one measure over common samples. verdict: "a", "b" (which is better) or "tied", where the interval of
    the difference has 0 in it or there is one sample only."""

    task: str
    budget: float
    a: str
    b: str
    measure: Measure
    change: Estimate
    verdict: str


def compare(a: Path, b: Path) -> list[Comparison]:
    """Compares what two folders of `run_suite` have in common, or two cells of such folders (`cells/*.json`).

    Raises EvaluationError for what is no suite, was made from different samples or another model, or shares no task.
    """
    (manifest_a, cells_a), (manifest_b, cells_b) = _load(a), _load(b)
    check_same(_comparable(manifest_a), _comparable(manifest_b), f"{a} was made", str(b), "compare like with like")
    found = [
        _compared(cell_a, cell_b, measure, change)
        for cell_a, cell_b in _pairs(cells_a, cells_b)
        for measure in measures_of(cell_a.task)
        if (change := difference(cell_a, cell_b, measure)) is not None
    ]
    if not found:
        raise EvaluationError(
            f"{a} and {b} have no family, budget and task in common; give two files of their cells folders instead"
        )
    return found


def _load(path: Path) -> tuple[Manifest, list[Cell]]:
    if path.is_file():
        return Folder(path.parent.parent).manifest(), [read(path, Cell)]
    folder = Folder(path)
    return folder.manifest(), folder.cells()


def _comparable(manifest: Manifest) -> Manifest:
    kept = {name: value for name, value in manifest.settings.items() if name not in DIFFERENT_ON_PURPOSE}
    return Manifest("", manifest.model, manifest.fingerprint, kept, manifest.samples)


def _pairs(a: list[Cell], b: list[Cell]) -> Iterator[tuple[Cell, Cell]]:
    """Cells of the same family, budget and task; two lone cells of one task whatever they are of."""
    if len(a) == len(b) == 1 and a[0].task == b[0].task:
        yield a[0], b[0]
        return
    of_b = {(cell.task, cell.bits, cell.family): cell for cell in b}
    for cell in a:
        other = of_b.get((cell.task, cell.bits, cell.family))
        if other is not None:
            yield cell, other


def _compared(a: Cell, b: Cell, measure: Measure, change: Estimate) -> Comparison:
    better = (change.mean > 0) == measure.higher
    verdict = "tied" if not change.differs else "b" if better else "a"
    return Comparison(a.task, a.bits, _name(a), _name(b), measure, change, verdict)


def _name(cell: Cell) -> str:
    return f"{cell.family} at {cell.bits:g} bits"
