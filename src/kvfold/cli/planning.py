"""Options and tables that `kvfold simulate` and `kvfold plan` share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from kvfold.benchmark.measures import Distribution

Trace = Annotated[Path, typer.Option(help="Times and lengths: Azure CSV or Mooncake JSONL.", metavar="FILE")]
ProfileFile = Annotated[Path, typer.Option("--profile", help="What `kvfold profile --out` wrote.", metavar="FILE")]
First = Annotated[int, typer.Option("--from", help="First request of the trace to play.", metavar="N")]
Requests = Annotated[int, typer.Option(help="How many requests to play.", metavar="N")]
LengthsScale = Annotated[float, typer.Option(help="Factor of the trace's lengths.", metavar="F")]
LinkGbps = Annotated[float, typer.Option(help="Link between workers, 10^9 bits per second each way.", metavar="G")]
LinkOverhead = Annotated[float, typer.Option(help="Seconds per handover beside its bytes.", metavar="S")]
FirstToken = Annotated[
    Literal["prefill", "pull"],
    typer.Option(help="Who answers first: the prefill worker, or the decode worker once it has pulled the pages."),
]


def milliseconds(value: "Distribution | None") -> list[str]:
    """Mean, p50, p90 and p99 as cells of a table."""
    if value is None:
        return ["-"] * 4
    return [f"{1000 * each:,.1f}" for each in (value.mean, value.p50, value.p90, value.p99)]


def write_json(document: dict[str, Any], path: Path) -> None:
    """Writes a document, dataclasses and all, whole or not at all. Raises PlacementError."""
    import msgspec

    from kvfold.config.files import write_atomically
    from kvfold.planner.errors import PlacementError

    try:
        write_atomically(path, msgspec.json.encode(document))
    except OSError as error:
        raise PlacementError(f"cannot write {path}: {error.strerror}; give another --out") from error
