"""The report of a suite: one HTML page that needs nothing else, and the pictures as files beside it."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from typing import Any

from kvfold.evaluation.bootstrap import LEVEL
from kvfold.evaluation.errors import EvaluationError
from kvfold.evaluation.folder import Folder, write, write_bytes
from kvfold.evaluation.measures import measures_of
from kvfold.evaluation.plots import Picture, check_plots, loss_picture, needle_picture
from kvfold.evaluation.summary import BEST, OVER, TIED, Summary, summarise
from kvfold.evaluation.tasks.needle import Needle
from kvfold.evaluation.wording import dense_value, heading, told

REPORT = "report.html"
SUMMARY = "summary.json"
TEMPLATE = "report.html.jinja"


@dataclass(frozen=True)
class Table:
    """Rows of one task and budget: rank, family with its members, and figures as text under `heads`."""

    title: str
    note: str
    heads: list[str]
    rows: list[dict[str, Any]]


def write_report(folder: Folder) -> Summary:
    """Writes summary.json, pictures and report.html from the cells that are in the folder.

    Raises EvaluationError where there are none, or no matplotlib.
    """
    check_plots()
    manifest, cells = folder.manifest(), folder.cells()
    if not cells:
        raise EvaluationError(
            f"{folder.path} has no finished cell: no family fits any budget; raise --budgets or name other methods"
        )
    summary = summarise(manifest, cells, folder.plan())
    pictures = [loss_picture(summary, task) for task in summary.tasks]
    needles = [cell for cell in cells if cell.task == Needle.name]
    pictures += [needle_picture(list(group)) for _, group in groupby(needles, key=lambda cell: cell.bits)]
    write(folder.path / SUMMARY, summary)
    for picture in pictures:
        write_bytes(folder.path / picture.name, picture.png)
    write_bytes(folder.path / REPORT, _page(summary, pictures).encode())
    return summary


def tables(summary: Summary) -> list[Table]:
    """One table per task and budget, best family first."""
    made = []
    for (task, budget), group in groupby(summary.rows, key=lambda row: (row.task, row.budget)):
        measures = measures_of(task)
        dense = summary.dense[task]
        note = ", ".join(f"{m.label} {dense_value(m, dense[m.name])}" for m in measures if m.relative)
        rows = [
            {
                "rank": row.rank,
                "family": row.family,
                "methods": _members(row.methods),
                "figures": [
                    f"{row.planned:.2f}",
                    f"{row.bits:.2f}",
                    f"{row.compression:.2f}x",
                    *(told(m, row.changes[m.name], row.values[m.name]) for m in measures),
                ],
            }
            for row in group
        ]
        heads = ["bits at the context's end", "bits measured", "compression", *map(heading, measures)]
        made.append(Table(f"{task} at {budget:g} bits", f"dense: {note}", heads, rows))
    return made


def _members(methods: Mapping[int, str]) -> list[str]:
    if len(set(methods.values())) == 1:
        return [next(iter(methods.values()))]
    return [f"{length}: {method}" for length, method in methods.items()]


def _page(summary: Summary, pictures: list[Picture]) -> str:
    from jinja2 import Environment, StrictUndefined

    source = files(__package__).joinpath(TEMPLATE).read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(
        summary=summary,
        tables=tables(summary),
        pictures=[(picture, base64.b64encode(picture.png).decode()) for picture in pictures],
        level=f"{LEVEL:.0%}",
        best=BEST,
        tied=TIED,
        over=OVER,
    )
