"""`kvfold eval`: measure what a method costs in quality and saves in bytes."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvfold.cli import options
from kvfold.cli.output import print_curve, print_json, print_report, report_fields
from kvfold.cli.progress import ConsoleProgress
from kvfold.config.method import parse_method
from kvfold.config.size import parse_bytes
from kvfold.errors import ConfigError

if TYPE_CHECKING:
    from kvfold.evaluation.compare import Comparison
    from kvfold.evaluation.summary import Summary

app = typer.Typer(help="Measure quality and bytes, and compare methods.")

_Number = TypeVar("_Number", int, float)


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("perplexity")
def perplexity(
    text: Annotated[Path, typer.Option("--text", help="Text to evaluate on.", metavar="FILE")],
    model: options.Model = options.DEFAULT_MODEL,
    kv: options.KV = "none",
    window: Annotated[int, typer.Option(help="Tokens per sequence.", metavar="N")] = 2048,
    chunk: Annotated[int, typer.Option(help="Tokens per step, as in chunked prefill.", metavar="N")] = 128,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to evaluate.", metavar="N")] = None,
    start: options.From = 0.0,
    stop: options.To = 1.0,
    kv_memory: Annotated[
        str | None, typer.Option("--kv-memory", help="Memory for KV pages (default: what four windows need).")
    ] = None,
    dtype: options.Dtype = "auto",
    weights: options.Weights = "auto",
    calibration: options.Calibration = None,
    json: options.Json = False,
) -> None:
    """Perplexity with METHOD and with the dense cache, on the same path as generation."""
    parse_method(kv)
    memory = None if kv_memory is None else parse_bytes(kv_memory)

    from kvfold.evaluation.perplexity import evaluate

    report = evaluate(
        model,
        kv,
        text,
        window=window,
        chunk=chunk,
        max_tokens=max_tokens,
        start=start,
        stop=stop,
        calibration=calibration,
        dtype=dtype,
        weights=weights,
        kv_memory=memory,
        progress=ConsoleProgress(),
    )
    fields = report_fields(report)
    if json:
        print_json(fields)
    else:
        print_curve(report.curve)
        print_report(f"{model} with {kv}", fields)


@app.command("suite")
def suite(
    methods: Annotated[
        list[str],
        typer.Option(
            "--methods",
            help="Families, separated by commas, each with one number left free: 'zeroc,snapkv+kivi(bits=4)'. "
            "Joined by | the largest that fits is taken: 'kivi(bits=2)|kivi(bits=4)'. 'all' is every method.",
            metavar="METHODS",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the results; an interrupted run goes on.")],
    model: options.Model = options.DEFAULT_MODEL,
    budgets: Annotated[
        str, typer.Option(help="Total bits per number of the dense cache, which has 16.", metavar="BITS,...")
    ] = "2,3,4,6",
    tasks: Annotated[str, typer.Option(help="Tasks, separated by commas.", metavar="TASK,...")] = (
        "text,lines,needle,keys,qa"
    ),
    context: Annotated[str, typer.Option(help="Context lengths in tokens.", metavar="N,...")] = "2048",
    samples: Annotated[int, typer.Option(help="Samples per task and context length.", metavar="N")] = 10,
    continuation: Annotated[int, typer.Option(help="Tokens that the text task predicts.", metavar="N")] = 256,
    seed: Annotated[int, typer.Option(help="Another seed takes other samples.", metavar="N")] = 0,
    query_aware: Annotated[
        bool, typer.Option("--query-aware", help="Methods compress when they have read the question, too.")
    ] = False,
    calibration: options.Calibration = None,
    dtype: options.Dtype = "auto",
    json: options.Json = False,
) -> None:
    """Methods at equal total bytes, in several tasks: figures with intervals, pictures, a report in HTML.

    The tasks' data is looked for in the folder that KVFOLD_DATA names (default: ../shared/data).
    """
    bits, lengths = _numbers(budgets, "--budgets", float), _numbers(context, "--context", int)

    from kvfold.evaluation.plots import check_plots
    from kvfold.evaluation.report import REPORT, write_report
    from kvfold.evaluation.settings import SuiteSettings
    from kvfold.evaluation.suite import run_suite

    check_plots()
    settings = SuiteSettings(tuple(lengths), samples, seed, continuation, query_aware, calibration, dtype)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    folder = run_suite(model, methods, bits, names, out, settings, ConsoleProgress())
    summary = write_report(folder)
    if json:
        print_json(report_fields(summary))
    else:
        _show_suite(summary)
        typer.echo(f"report: {out / REPORT}")


@app.command("compare")
def compare(
    a: Annotated[Path, typer.Argument(help="Folder of `eval suite`, or one of its cells/*.json.", metavar="A")],
    b: Annotated[Path, typer.Argument(help="Another of the same model and samples.", metavar="B")],
    json: options.Json = False,
) -> None:
    """Which of two suites, or of two cells, is better: differences sample by sample, with intervals."""
    from kvfold.evaluation.compare import compare as compared

    found = compared(a, b)
    if json:
        print_json({"a": a, "b": b, "comparisons": found})
    else:
        _show_comparison(found, a, b)


def _show_suite(summary: "Summary") -> None:
    from kvfold.evaluation.measures import headline
    from kvfold.evaluation.wording import heading, told

    console = Console()
    for task in summary.tasks:
        measures = headline(task)
        aware = "query-aware" if summary.query_aware else "query-agnostic"
        table = Table(title=f"{task}, {aware}", title_justify="left")
        for head in ("budget", "rank", "family", "bits", *map(heading, measures)):
            table.add_column(head, justify="left" if head in ("rank", "family") else "right")
        for row in summary.rows:
            if row.task == task:
                figures = [told(m, row.changes[m.name], row.values[m.name]) for m in measures]
                table.add_row(f"{row.budget:g}", row.rank, Text(row.family), f"{row.bits:.2f}", *figures)
        console.print(table)


def _show_comparison(found: "list[Comparison]", a: Path, b: Path) -> None:
    from dataclasses import replace

    from kvfold.evaluation.wording import heading, told

    table = Table(title=f"A = {a}, B = {b}; differences are B - A", title_justify="left")
    for head in ("task", "A", "B", "measure", "difference", "better"):
        table.add_column(head, justify="right" if head == "difference" else "left")
    for one in found:
        change = told(replace(one.measure, relative=True), one.change)
        names = (Text(one.a), Text(one.b if one.b != one.a else "same"))
        table.add_row(one.task, *names, heading(one.measure), change, one.verdict.upper().replace("TIED", "tied"))
    Console().print(table)


def _numbers(text: str, option: str, kind: Callable[[str], _Number]) -> list[_Number]:
    """Raises ConfigError for anything but numbers separated by commas."""
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ConfigError(f"{option} {text!r} is no list of numbers; write them like 2048,4096") from error
