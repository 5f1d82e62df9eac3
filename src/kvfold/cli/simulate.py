"""`kvfold simulate`: replay a trace through a placement of simulated workers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvfold.cli import options, planning
from kvfold.cli.output import print_json, report_fields
from kvfold.config.size import format_bytes, parse_bytes
from kvfold.errors import ConfigError

if TYPE_CHECKING:
    from kvfold.planner.records import Limits, Summary


def simulate(
    trace: planning.Trace,
    placement: Annotated[
        str,
        typer.Option(help="colocated(workers=N) or disaggregated(prefill=P,decode=D).", metavar="PLACEMENT"),
    ] = "colocated(workers=1)",
    kv: options.KV = "none",
    profile: planning.ProfileFile = Path("profile.json"),
    kv_memory: options.KVMemory = "1GiB",
    rate: Annotated[
        list[float] | None,
        typer.Option("--rate", help="Requests per second (default: the trace's own); may be repeated.", metavar="R"),
    ] = None,
    rate_scale: Annotated[float, typer.Option(help="Factor of the trace's own rate.", metavar="F")] = 1.0,
    lengths_scale: planning.LengthsScale = 1.0,
    first: planning.First = 0,
    requests: planning.Requests = 500,
    link_gbps: planning.LinkGbps = 10.0,
    link_overhead: planning.LinkOverhead = 0.0,
    first_token: planning.FirstToken = "prefill",
    request_overhead: Annotated[
        float, typer.Option(help="Seconds of a request's way to a worker and back: HTTP, processes.", metavar="S")
    ] = 0.0,
    slowdown: Annotated[
        float, typer.Option(help="Share by which a step takes longer while another worker computes.", metavar="F")
    ] = 0.0,
    ttft: Annotated[float | None, typer.Option(help="Most seconds to the first token.", metavar="S")] = None,
    tpot: Annotated[float | None, typer.Option(help="Most seconds per further token.", metavar="S")] = None,
    out: Annotated[Path | None, typer.Option(help="Save every request's times here (JSON).", metavar="FILE")] = None,
    json: options.Json = False,
) -> None:
    """Say what a placement of workers will do with a trace: TTFT, TPOT, memory, handovers.

    Attainment is the share of requests that meet --ttft and --tpot both.
    """
    if rate and rate_scale != 1:
        raise ConfigError("--rate and --rate-scale say two things; give one of them")

    from kvfold.planner.company import Surroundings
    from kvfold.planner.document import load_profile
    from kvfold.planner.placement import Link, parse_placement
    from kvfold.planner.records import arrival_rate, summarize
    from kvfold.planner.simulator import simulate as run
    from kvfold.planner.workload import at_rate, load_requests

    memory, where = parse_bytes(kv_memory), parse_placement(placement)
    link, limits = Link(link_gbps, link_overhead, first_token), _limits(ttft, tpot)
    surroundings = Surroundings(request_overhead, slowdown)
    known = load_profile(profile)
    method = known.of(kv)
    played, cut = load_requests(trace, known.positions, first=first, count=requests, lengths_scale=lengths_scale)
    workloads = [at_rate(played, each) for each in rate or ()]
    if not rate:
        own = arrival_rate([request.at for request in played])
        workloads = [played if rate_scale == 1 else at_rate(played, own * rate_scale)]
    results = [run(each, where, method, known.limits, memory, link, surroundings) for each in workloads]
    summaries = [summarize(result, limits) for result in results]
    settings: dict[str, Any] = {
        "trace": trace.name,
        "placement": str(where),
        "kv": method.method,
        "model": known.model,
        "machine": known.machine,
        "kv_memory": memory,
        "link": link,
        "surroundings": surroundings,
        "limits": limits,
        "cut_to_positions": cut,
    }
    if out is not None:
        records = [[report_fields(record) for record in result.records] for result in results]
        planning.write_json({**settings, "runs": records}, out)
    if json:
        print_json({**settings, "runs": summaries})
        return
    if cut:
        typer.echo(f"note: {cut} of {len(played)} requests were cut to the model's {known.positions:,} positions")
    title = f"{trace.name}, {where}, {method.method}, {format_bytes(memory)} of KV memory each"
    Console().print(_table(title, summaries, method.layout.page_bytes))


def _limits(ttft: float | None, tpot: float | None) -> "Limits | None":
    import math

    from kvfold.planner.goodput import Goal
    from kvfold.planner.records import Limits

    if ttft is None and tpot is None:
        return None
    limits = Limits(math.inf if ttft is None else ttft, math.inf if tpot is None else tpot)
    return Goal(limits).limits  # which refuses what are no limits


def _table(title: str, summaries: list["Summary"], page_bytes: int) -> Table:
    table = Table(title=Text(title), title_justify="left")
    table.add_column("")
    for summary in summaries:
        table.add_column(f"{summary.rate:.3g} requests/s", justify="right")
    rows: dict[str, list[str]] = {}

    def add(name: str, cell: str) -> None:
        rows.setdefault(name, []).append(cell)

    for each in summaries:
        add("requests", f"{each.requests:,}")
        for name, share in (
            ("attainment, both", each.attainment),
            ("  TTFT alone", each.ttft_attainment),
            ("  TPOT alone", each.tpot_attainment),
        ):
            if share is not None:
                add(name, f"{share:.1%}")
        for name, value in (("TTFT", each.ttft), ("TPOT", each.tpot), ("handover", each.transfer_seconds)):
            if name == "handover" and not any(s.transfers for s in summaries):
                continue
            for part, cell in zip(("mean", "p50", "p90", "p99"), planning.milliseconds(value), strict=True):
                add(f"{name} {part} (ms)", cell)
        add("output tokens/s", f"{each.output_throughput:,.1f}")
        add("peak KV memory", " ".join(format_bytes(pages * page_bytes) for pages in each.peak_pages))
        add("peak pages", " ".join(f"{pages:,}" for pages in each.peak_pages))
        add("preemptions", f"{each.preemptions:,}")
        if any(s.cached_share for s in summaries):
            add("prompt tokens cached", f"{each.cached_share:.1%}")
        if any(s.transfers for s in summaries):
            add("transfers", f"{each.transfers:,}")
            add("bytes sent", format_bytes(each.transfer_bytes))
        add("steps", f"{each.steps:,}")
        add("duration (s)", f"{each.duration:,.1f}")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table
