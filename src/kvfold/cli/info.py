"""`kvfold info`: what a model is and how many tokens fit in a memory."""

from typing import Annotated

import typer

from kvfold.cli import options
from kvfold.cli.output import print_json, print_report, report_fields
from kvfold.config.method import parse_method
from kvfold.config.size import parse_bytes


def info(
    model: options.Model = options.DEFAULT_MODEL,
    kv: options.KV = "none",
    memory: Annotated[
        str, typer.Option("--memory", help="KV memory to count tokens for, such as 1GiB.", metavar="SIZE")
    ] = "1GiB",
    json: options.Json = False,
) -> None:
    """Family, layers, heads, KV bytes per token and how many tokens fit in a memory."""
    parse_method(kv)
    size = parse_bytes(memory)

    from kvfold.evaluation.info import describe

    fields = report_fields(describe(model, kv, size))
    if json:
        print_json(fields)
    else:
        print_report(model, fields)
