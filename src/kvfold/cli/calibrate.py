"""`kvfold calibrate`: measure a model once, so that ZeroC can fold its maps."""

from pathlib import Path
from typing import Annotated

import typer

from kvfold.cli import options
from kvfold.cli.output import print_json, print_report, report_fields
from kvfold.cli.progress import ConsoleProgress


def calibrate(
    model: options.Model = options.DEFAULT_MODEL,
    text: Annotated[
        Path | None,
        typer.Option("--text", help="Text to calibrate on (default: English that Python carries).", metavar="FILE"),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of the text to use.", metavar="N")] = None,
    context: Annotated[
        int | None, typer.Option(help="Positions to calibrate for (default: the model's, up to 8192).", metavar="N")
    ] = None,
    start: options.From = 0.0,
    stop: options.To = 1.0,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Directory for the result (default: the user's cache).", metavar="DIR"),
    ] = None,
    json: options.Json = False,
) -> None:
    """Measure a model on a text and save what ZeroC needs."""
    from kvfold.calibration.run import calibrate as run

    result = run(
        model,
        text=text,
        start=start,
        stop=stop,
        tokens=tokens,
        context=context,
        out=out,
        progress=ConsoleProgress(),
    )
    fields = report_fields(result)
    if json:
        print_json(fields)
    else:
        print_report(f"Calibration of {model}", fields)
