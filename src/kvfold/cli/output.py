"""What commands print: one JSON object, or tables for people."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvfold.config.size import format_bytes


def print_json(value: Mapping[str, Any]) -> None:
    """Print `value` as one JSON object on stdout; numbers that JSON lacks (nan, inf) become null."""
    # ASCII escapes survive every terminal encoding.
    typer.echo(json.dumps(_plain(value), allow_nan=False, indent=2))


def report_fields(report: Any) -> dict[str, Any]:
    """The fields of a report (a dataclass), by name."""
    return {field.name: getattr(report, field.name) for field in fields(report)}


def print_report(title: str, report: Mapping[str, Any]) -> None:
    """Print the scalars of a report as a table of name and value; longer things are for JSON."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in report.items():
        if value is not None and not isinstance(value, list | tuple | set | Mapping) and not is_dataclass(value):
            table.add_row(name.replace("_", " "), Text(shown(name, value)))
    Console().print(table)


def print_curve(curve: Sequence[Any]) -> None:
    """Print on stderr what a search for `max_loss` measured (objects with `bits` and `loss`); nothing if empty."""
    if not curve:
        return
    table = Table(title="measured on held-out calibration text", title_justify="left")
    table.add_column("bits", justify="right")
    table.add_column("perplexity", justify="right")
    for trial in curve:
        table.add_row(f"{trial.bits:g}", f"{trial.loss:+.2%}")
    Console(stderr=True).print(table)


def shown(name: str, value: object) -> str:
    """`value` as people read it; the unit is told by the field's name."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if "bytes" in name or name == "memory":
        return format_bytes(value) if value >= 0 else str(value)
    if name == "seconds":
        return f"{value:.1f}"
    if name == "compression":
        return f"{value:.2f}x"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _plain(value: Any) -> Any:
    """`value` in the types JSON has; dataclasses become objects, what is left becomes its string."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(report_fields(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
