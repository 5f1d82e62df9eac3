"""`kvfold eval`: measure what a method costs in quality and saves in bytes."""

from pathlib import Path
from typing import Annotated

import typer

from kvfold.cli import options
from kvfold.cli.output import print_curve, print_json, print_report, report_fields
from kvfold.cli.progress import ConsoleProgress
from kvfold.config.method import parse_method
from kvfold.config.size import parse_bytes

app = typer.Typer(help="Measure quality and bytes on a text.")


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
        kv_memory=memory,
        progress=ConsoleProgress(),
    )
    fields = report_fields(report)
    if json:
        print_json(fields)
    else:
        print_curve(report.curve)
        print_report(f"{model} with {kv}", fields)
