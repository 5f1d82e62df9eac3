"""`kvfold plan`: which placement and method serve most requests within latency limits."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvfold.cli import options, planning
from kvfold.cli.output import print_json
from kvfold.cli.progress import ConsoleProgress
from kvfold.config.size import format_bytes, parse_bytes
from kvfold.errors import ConfigError

if TYPE_CHECKING:
    from kvfold.planner.search import Candidate, Search

POINTS = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)
"""Rates of a plot, as shares of the goodput."""


def plan(
    trace: planning.Trace,
    ttft: Annotated[float, typer.Option(help="Most seconds to the first token.", metavar="S")],
    tpot: Annotated[float, typer.Option(help="Most seconds per further token.", metavar="S")],
    workers: Annotated[
        int | None, typer.Option(help="Workers there are: how much can they serve?", metavar="N")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Requests per second that are wanted: how many workers?", metavar="R")
    ] = None,
    attainment: Annotated[float, typer.Option(help="Share of requests that meet both limits.", metavar="A")] = 0.9,
    profile: planning.ProfileFile = Path("profile.json"),
    kv: Annotated[
        list[str] | None,
        typer.Option("--kv", help="Method to consider; may be repeated (default: all profiled).", metavar="METHOD"),
    ] = None,
    kv_memory: options.KVMemory = "1GiB",
    lengths_scale: planning.LengthsScale = 1.0,
    first: planning.First = 0,
    requests: planning.Requests = 200,
    link_gbps: planning.LinkGbps = 10.0,
    link_overhead: planning.LinkOverhead = 0.0,
    first_token: planning.FirstToken = "prefill",
    node_workers: Annotated[
        int | None, typer.Option(help="Workers that share a machine (default: one each).", metavar="N")
    ] = None,
    algorithm: Annotated[
        Literal["auto", "1", "2"], typer.Option(help="DistServe's for fast links (1), slow ones (2), or by the link.")
    ] = "auto",
    plot: Annotated[
        Path | None, typer.Option(help="Draw attainment against rate (png, svg, pdf).", metavar="FILE")
    ] = None,
    json: options.Json = False,
) -> None:
    """Search placements and methods for the highest rate at which enough requests meet both limits, or for the fewest
    workers at a given rate.

    Every candidate is simulated with the trace's own bursts at other rates; docs/planner.md says how.
    """
    if (workers is None) == (rate is None):
        raise ConfigError("a plan is for a number of workers or for a rate; give --workers or --rate")

    from kvfold.planner.document import load_profile
    from kvfold.planner.goodput import Goal
    from kvfold.planner.placement import Link
    from kvfold.planner.plot import check_plot
    from kvfold.planner.reach import check_reach
    from kvfold.planner.records import Limits
    from kvfold.planner.search import Cluster, Search
    from kvfold.planner.sizing import size_for
    from kvfold.planner.workload import load_requests

    goal = Goal(Limits(ttft, tpot), attainment)
    memory = parse_bytes(kv_memory)
    cluster = Cluster(
        1 if workers is None else workers, memory, Link(link_gbps, link_overhead, first_token), node_workers
    )
    if plot is not None:
        check_plot(plot)
    known = load_profile(profile)
    methods = list(dict.fromkeys(known.of(each).method for each in kv or [m.method for m in known.methods]))
    played, cut = load_requests(trace, known.positions, first=first, count=requests, lengths_scale=lengths_scale)
    search = Search(played, known, goal, cluster, algorithm)
    if rate is None:
        candidates = search.candidates(methods, ConsoleProgress())
    else:
        candidates = size_for(search, rate, methods, ConsoleProgress())
    check_reach(candidates, goal)
    if plot is not None:
        title = f"{trace.name}: TTFT {ttft:g} s, TPOT {tpot:g} s"
        _plot(search, candidates, title, plot)
    if json:
        print_json(
            {
                "trace": trace.name,
                "model": known.model,
                "machine": known.machine,
                "requests": len(played),
                "cut_to_positions": cut,
                "goal": goal,
                "cluster": cluster,
                "candidates": [_document(c, search) for c in candidates],
            }
        )
        return
    if cut:
        typer.echo(f"note: {cut} of {len(played)} requests were cut to the model's {known.positions:,} positions")
    title = (
        f"{trace.name}: {len(played)} requests, TTFT {ttft:g} s and TPOT {tpot:g} s for {attainment:.4g} of them, "
        f"{f'{workers} workers' if rate is None else f'{rate:g} requests/s'}, {format_bytes(memory)} of KV memory each"
    )
    Console().print(_table(title, candidates, search))
    best = candidates[0]
    typer.echo(
        f"best: {best.placement} with {best.method}: {best.goodput:.3g} requests/s, {best.per_worker:.3g} per worker"
    )
    typer.echo(f'run it: kvfold serve {best.placement.options}--kv "{best.method}" --kv-memory {kv_memory}')


def _table(title: str, candidates: list["Candidate"], search: "Search") -> Table:
    table = Table(
        title=Text(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left"
    )
    table.add_column("workers")
    table.add_column("method", overflow="fold")
    for name in ("rate", "each", "TTFT ms", "TPOT ms", "KV"):
        table.add_column(name, justify="right", no_wrap=True)
    notes = [
        "rate, each: requests/s of all workers and per worker; TTFT, TPOT: 90th percentile at that rate;",
        "KV: most that one worker held",
    ]
    for each in candidates:
        entry, where = _document(each, search), each.unit
        unit = f"{where.mixed} co-located" if where.mixed else f"{where.prefill} prefill, {where.decode} decode"
        table.add_row(
            unit if each.copies == 1 else f"{each.copies} x ({unit})",
            Text(each.method),
            f"{each.goodput:.3g}" + ("*" if each.found.bounded else "") if each.goodput else "none",
            f"{each.per_worker:.3g}",
            *("-" if entry[name] is None else f"{1000 * entry[name]:,.0f}" for name in ("ttft_p90", "tpot_p90")),
            format_bytes(entry["peak_bytes"]),
        )
        if each.prefill_rate is not None and each.decode_rate is not None:
            notes.append(
                f"{each.algorithm}, {each.method}: one prefill worker alone keeps TTFT up to "
                f"{each.prefill_rate:.3g}/s, one decode worker TPOT up to {each.decode_rate:.3g}/s"
            )
    if any(each.found.bounded for each in candidates):
        notes.append("*: as much as the workers finish at all; the limits are not what binds")
    if not all(each.goodput for each in candidates):
        notes.append(
            "none: the limits are out of reach at any rate; TTFT and TPOT are those of requests that come alone"
        )
    table.caption = Text("\n".join(notes))
    return table


def _document(candidate: "Candidate", search: "Search") -> dict[str, Any]:
    from kvfold.planner.records import summarize

    summary = summarize(candidate.found.result, search.goal.limits)
    return {
        "placement": str(candidate.placement),
        "unit": str(candidate.unit),
        "copies": candidate.copies,
        "method": candidate.method,
        "algorithm": candidate.algorithm,
        "goodput": candidate.goodput,
        "per_worker": candidate.per_worker,
        "bounded_by_throughput": candidate.found.bounded,
        "prefill_rate": candidate.prefill_rate,
        "decode_rate": candidate.decode_rate,
        "attainment": summary.attainment,
        "ttft_p90": None if summary.ttft is None else summary.ttft.p90,
        "tpot_p90": None if summary.tpot is None else summary.tpot.p90,
        "peak_bytes": summary.peak_bytes,
        "transfer_bytes": summary.transfer_bytes,
    }


def _plot(search: "Search", candidates: list["Candidate"], title: str, path: Path) -> None:
    from kvfold.planner.goodput import curve
    from kvfold.planner.plot import save_plot

    curves = {}
    for each in candidates:
        if each.goodput:
            run = search.simulator(search.profile.of(each.method), each.unit, each.link)
            rates = [share * each.found.rate for share in POINTS]
            shares = curve(search.requests, search.goal, run, rates)
            name = f"{each.placement}, {each.method}"
            curves[name] = [(rate * each.copies, share) for rate, share in zip(rates, shares, strict=True)]
    save_plot(curves, search.goal.attainment, title, path)
