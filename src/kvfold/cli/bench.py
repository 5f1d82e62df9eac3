"""`kvfold bench`: measure a running server under load, or a step of the engine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from kvfold.cli import options
from kvfold.cli.output import print_json, report_fields
from kvfold.cli.progress import ConsoleProgress
from kvfold.config.method import parse_method
from kvfold.errors import ConfigError

if TYPE_CHECKING:
    from kvfold.benchmark.report import Report

INTERRUPTED = 130

app = typer.Typer(help="Measure a running server under load, or a decoding step.")


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("serve")
def serve(
    url: Annotated[str, typer.Option(help="OpenAI-compatible server.", metavar="URL")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Model to ask (default: the first).", metavar="MODEL")] = None,
    kv: Annotated[
        list[str] | None,
        typer.Option("--kv", help="Compression of the KV cache; give several to compare them.", metavar="METHOD"),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="KVFOLD_API_KEY", help="Key of the server.", metavar="KEY", show_envvar=True)
    ] = None,
    endpoint: Annotated[Literal["chat", "completions"], typer.Option(help="Which route to load.")] = "chat",
    rate: Annotated[
        float | None, typer.Option(help="Requests per second, or inf: all at once (default).", metavar="R")
    ] = None,
    burstiness: Annotated[
        float, typer.Option(help="Gamma shape of the gaps: 1 Poisson, less is burstier.", metavar="B")
    ] = 1.0,
    concurrency: Annotated[
        int | None, typer.Option(help="Most requests in flight; without --rate a closed loop.", metavar="N")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Times and lengths: Azure CSV or Mooncake JSONL.", metavar="FILE")
    ] = None,
    speed: Annotated[float, typer.Option(help="Play the trace this much faster.", metavar="F")] = 1.0,
    first: Annotated[int, typer.Option("--from", help="First request of the trace to play.", metavar="N")] = 0,
    requests: Annotated[int, typer.Option(help="How many requests to send.", metavar="N")] = 100,
    scale: Annotated[float, typer.Option(help="Factor of the trace's lengths.", metavar="F")] = 1.0,
    input_tokens: Annotated[
        str | None, typer.Option(help="Tokens per prompt: N or LOW:HIGH (default: 512).", metavar="N")
    ] = None,
    output_tokens: Annotated[
        str | None, typer.Option(help="Tokens per answer: N or LOW:HIGH (default: 128).", metavar="N")
    ] = None,
    shared_prefix: Annotated[int, typer.Option(help="Leading tokens that all prompts share.", metavar="N")] = 0,
    dataset: Annotated[
        Path | None, typer.Option(help="Text to cut prompts from, or JSONL of prompts (MT-Bench).", metavar="FILE")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Equal seeds send equal prompts, which a prefix cache remembers.", metavar="N")
    ] = 0,
    warmup: Annotated[int, typer.Option(help="Requests before the measured ones.", metavar="N")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds for a whole answer.", metavar="S")] = 600.0,
    ignore_eos: Annotated[bool, typer.Option(help="Make answers exactly as long as asked.")] = True,
    ttft_limit: Annotated[
        float | None, typer.Option(help="Goodput: most seconds to the first token.", metavar="S")
    ] = None,
    tpot_limit: Annotated[
        float | None, typer.Option(help="Goodput: most seconds per further token.", metavar="S")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Save bench.json (every request) and bench.png here.", metavar="DIR")
    ] = None,
    json: options.Json = False,
) -> None:
    """Send requests to an OpenAI-compatible server and report latency, throughput and goodput.

    Latencies count from when a request should have been sent. Several --kv run one after the other.
    """
    from kvfold.benchmark.lengths import parse_lengths
    from kvfold.benchmark.options import Limits, TargetOptions, WorkloadOptions
    from kvfold.benchmark.session import benchmark

    target = TargetOptions(url, model, tuple(kv or ()), api_key, endpoint, ignore_eos, timeout)
    workload = WorkloadOptions(
        requests=requests,
        rate=rate,
        burstiness=burstiness,
        concurrency=concurrency,
        trace=trace,
        speed=speed,
        first=first,
        scale=scale,
        input_tokens=None if input_tokens is None else parse_lengths(input_tokens, "--input-tokens"),
        output_tokens=None if output_tokens is None else parse_lengths(output_tokens, "--output-tokens"),
        shared_prefix=shared_prefix,
        dataset=dataset,
        seed=seed,
        warmup=warmup,
    )
    limits = Limits(ttft_limit, tpot_limit)
    if out is not None:
        _prepare(out)
    report = benchmark(target, workload, limits, progress=ConsoleProgress())
    _show(report, json)
    if out is not None:
        _save(report, out)
    if report.interrupted:
        raise typer.Exit(INTERRUPTED)
    _check(report)


def _prepare(out: Path) -> None:
    """Find out before the load whether the results can be kept."""
    from kvfold.benchmark.errors import BenchmarkError
    from kvfold.benchmark.plot import MISSING, can_plot

    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        raise BenchmarkError(f"cannot write to {out}: {error.strerror}; give another --out") from error
    if not can_plot():
        typer.echo(f"kvfold: {MISSING}", err=True)


def _show(report: "Report", json: bool) -> None:
    from kvfold.benchmark.report import report_document, report_table

    if json:
        print_json(report_document(report, with_requests=False))
    else:
        Console().print(report_table(report))


def _save(report: "Report", out: Path) -> None:
    from kvfold.benchmark.plot import can_plot, save_plot
    from kvfold.benchmark.report import report_document, save_document

    save_document(report_document(report, with_requests=True), out / "bench.json")
    if can_plot():
        save_plot(report, out / "bench.png")


def _check(report: "Report") -> None:
    """A benchmark in which nothing succeeded has measured nothing."""
    from kvfold.benchmark.errors import BenchmarkError

    if any(run.summary.completed for run in report.runs):
        return
    kinds = [kind for run in report.runs for kind in run.summary.errors]
    raise BenchmarkError(
        f"no request succeeded ({', '.join(dict.fromkeys(kinds))}); see the notes and the server's log"
    )


@app.command("step")
def step(
    model: options.Model = options.DEFAULT_MODEL,
    kv: options.KV = "zeroc(bits=4)",
    batch: Annotated[int, typer.Option(help="Sequences that decode together.", metavar="N")] = 1,
    context: Annotated[int, typer.Option(help="Tokens of each prompt.", metavar="N")] = 2048,
    steps: Annotated[int, typer.Option(help="Steps that are timed, and as many that are profiled.", metavar="N")] = 20,
    threads: Annotated[int | None, typer.Option(help="Threads (default: one per core).", metavar="N")] = None,
    dtype: options.Dtype = "auto",
    weights: options.Weights = "auto",
    calibration: options.Calibration = None,
    json: options.Json = False,
) -> None:
    """Where the time of a decoding step goes."""
    parse_method(kv)
    for name, value in (("--batch", batch), ("--context", context), ("--steps", steps)):
        if value < 1:
            raise ConfigError(f"{name} {value} is out of range; give at least 1")

    from kvfold.benchmark.step import profile_steps

    progress = ConsoleProgress()
    report = profile_steps(
        model,
        kv,
        batch,
        context,
        steps,
        progress=progress,
        threads=threads,
        dtype=dtype,
        weights=weights,
        calibration=calibration,
    )
    if json:
        print_json(report_fields(report))
        return
    each = 1000 * report.seconds
    table = Table(title=f"{model}, {kv}: {batch} x {context:,} tokens", title_justify="left")
    table.add_column("a decoding step")
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    for name, share in report.parts.items():
        table.add_row(name, f"{share * each:.2f}", f"{share:.0%}")
    table.add_row("all", f"{each:.2f}", f"{batch / report.seconds:,.1f} tokens/s")
    Console().print(table)
