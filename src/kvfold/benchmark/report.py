"""The result of a benchmark: as an object to save, and as a table to read."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvfold.benchmark.errors import BenchmarkError
from kvfold.benchmark.measures import Distribution, Summary
from kvfold.benchmark.outcome import Outcome
from kvfold.config.files import write_atomically
from kvfold.config.size import format_bytes

LATE_SECONDS = 0.01
"""Generator lag (p99) above which the report says so."""

BUSY = 0.8
"""Share of one core above which the generator may be what limits."""


@dataclass(frozen=True)
class Run:
    """The same workload under one method (None: the server's default)."""

    kv: str | None
    summary: Summary
    outcomes: list[Outcome]

    @property
    def name(self) -> str:
        """The method, for a column or a legend."""
        return self.kv or (self.summary.kv.method if self.summary.kv else "default")


@dataclass(frozen=True)
class Report:
    """A whole benchmark. settings: what was asked and what the server told; notes: what a reader must know."""

    title: str
    settings: dict[str, Any]
    notes: list[str]
    runs: list[Run]

    @property
    def interrupted(self) -> bool:
        """Whether it was stopped before its end."""
        return any(run.summary.interrupted for run in self.runs)


def report_document(report: Report, with_requests: bool) -> dict[str, Any]:
    """The report in the types of JSON; every request with its times (seconds) if `with_requests`."""
    runs = []
    for run in report.runs:
        entry: dict[str, Any] = {"kv": run.kv, "summary": _plain(asdict(run.summary))}
        if with_requests:
            entry["requests"] = [_request(outcome) for outcome in run.outcomes]
        runs.append(entry)
    return {"title": report.title, "settings": _plain(report.settings), "notes": report.notes, "runs": runs}


def _request(outcome: Outcome) -> Any:
    derived = {name: getattr(outcome, name) for name in ("ttft", "tpot", "e2e", "lag")}
    # Microseconds are finer than the clock of any event loop, and halve the file.
    return _plain({**asdict(outcome), **derived}, digits=6)


def _plain(value: Any, digits: int | None = None) -> Any:
    """`value` in the types of JSON, floats rounded to `digits`; JSON has no infinity, which becomes its name."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item, digits) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, digits) for item in value]
    if isinstance(value, float):
        return str(value) if not math.isfinite(value) else value if digits is None else round(value, digits)
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def save_document(document: dict[str, Any], path: Path) -> None:
    """Write `document` to `path`, whole or not at all. Raises BenchmarkError if it cannot."""
    try:
        write_atomically(path, json.dumps(document, allow_nan=False).encode())
    except OSError as error:
        raise BenchmarkError(f"cannot write {path}: {error.strerror}; give another --out") from error


def report_table(report: Report) -> RenderableType:
    """One table, a column for each run, with the title above it and the notes below."""
    table = Table()
    table.add_column("measure")
    for run in report.runs:
        table.add_column(Text(run.name), justify="right", overflow="fold")
    columns = [list(_rows(run.summary)) for run in report.runs]
    cells = [dict(column) for column in columns]
    for name in merged([[name for name, _ in column] for column in columns]):
        table.add_row(Text(name), *(Text(column.get(name, "-")) for column in cells), end_section=name in _LAST)
    return Group(
        Text(report.title), table, *(Text(f"note: {note}") for note in [*report.notes, *_warnings(report.runs)])
    )


def merged(lists: Sequence[Sequence[str]]) -> list[str]:
    """All names once; one that only some lists have stands behind its neighbour there."""
    names: list[str] = []
    for entries in lists:
        place = 0
        for name in entries:
            if name in names:
                place = names.index(name) + 1
            else:
                names.insert(place, name)
                place += 1
    return names


_LAST = ("duration (s)", "peak concurrency", "end to end p99 (s)")


def _rows(summary: Summary) -> Iterator[tuple[str, str]]:
    yield "requests completed", f"{summary.completed:,} of {summary.requests:,}"
    for kind, count in summary.errors.items():
        yield f"failed: {kind}", f"{count:,}"
    if summary.not_sent:
        yield "not sent", f"{summary.not_sent:,}"
    yield "duration (s)", f"{summary.duration:.2f}"
    yield "requests/s", f"{summary.request_throughput:.3f}"
    if summary.goodput is not None:
        yield "goodput (requests/s)", f"{summary.goodput:.3f}"
    yield "output tokens/s", f"{summary.output_throughput:,.1f}"
    yield "total tokens/s", f"{summary.total_throughput:,.1f}"
    yield "prompt tokens", f"{summary.prompt_tokens:,}"
    if summary.cached_tokens is not None:
        yield "prompt tokens cached", f"{summary.cached_tokens:,}"
    yield "output tokens", f"{summary.output_tokens:,}"
    yield "peak concurrency", f"{summary.peak_concurrency:,}"
    yield from _latency("TTFT", summary.ttft, 1000, "ms")
    if _differ(summary):
        yield from _latency("TTFT from send", summary.ttft_from_send, 1000, "ms")
    yield from _latency("TPOT", summary.tpot, 1000, "ms")
    yield from _latency("ITL", summary.itl, 1000, "ms")
    if _differ(summary):
        yield from _latency("end to end from send", summary.e2e_from_send, 1, "s")
    yield from _latency("end to end", summary.e2e, 1, "s")
    if summary.kv is not None:
        yield "KV bytes per request", format_bytes(round(summary.kv.bytes))
        yield "KV compression", "-" if summary.kv.compression is None else f"{summary.kv.compression:.2f}x"


def _latency(name: str, values: Distribution | None, factor: float, unit: str) -> Iterator[tuple[str, str]]:
    for statistic in ("mean", "p50", "p90", "p99"):
        shown = "-" if values is None else f"{getattr(values, statistic) * factor:,.{2 if unit == 'ms' else 3}f}"
        yield f"{name} {statistic} ({unit})", shown


def _differ(summary: Summary) -> bool:
    """Whether waiting before the sending changes the latencies enough to show both."""
    whole, sent = summary.ttft, summary.ttft_from_send
    return whole is not None and sent is not None and whole.p99 - sent.p99 > LATE_SECONDS


def _warnings(runs: list[Run]) -> Iterator[str]:
    for run in runs:
        summary = run.summary
        of = f" ({run.name})" if len(runs) > 1 else ""
        for kind in summary.errors:
            detail = next((o.detail for o in run.outcomes if o.error == kind), None)
            yield f"failed with {kind}, for example: {detail}{of}"
        if summary.lag is not None and summary.lag.p99 > LATE_SECONDS:
            yield f"the generator sent late: {summary.lag.p99 * 1000:.0f} ms at p99, counted in the latencies{of}"
        if summary.client_cpu > BUSY:
            yield f"the generator used {summary.client_cpu:.0%} of a core and may have limited the load{of}"
        if summary.truncated:
            yield f"{summary.truncated:,} answers have another length than asked{of}"
        if not summary.counted:
            yield f"the server gave no usage for some answers: their output tokens are chunks{of}"
        told, wanted = summary.prompt_tokens, summary.expected_prompt_tokens
        if wanted and abs(told - wanted) > 0.01 * wanted:
            yield f"prompts had {told:,} tokens by the server's count where {wanted:,} were meant{of}"
        if summary.interrupted:
            yield f"interrupted: only what was measured until then{of}"
