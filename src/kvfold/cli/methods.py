"""`kvfold methods`: which methods there are and what each of them saves, needs and allows."""

from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kvfold.cli import options
from kvfold.cli.output import print_json, print_report, report_fields
from kvfold.config.suggest import suggest
from kvfold.errors import ConfigError

COLUMNS = {
    "name": "method",
    "kind": "kind",
    "saves": "saves",
    "needs": "looks at",
    "prompt": "a prompt is",
    "prefixes": "shares",
    "query_aware": "query-aware",
    "paper": "paper",
}
BRIEF = ("name", "kind", "saves", "needs", "paper")
"""Columns where the terminal has no room for all."""
WIDE = 150


def methods(
    name: Annotated[str | None, typer.Argument(help="One method: all its facts.", metavar="[METHOD]")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as in docs/methods.md.")] = False,
    json: options.Json = False,
) -> None:
    """All KV methods: what each saves, needs and allows. Join a policy and a codec with '+'."""
    from kvfold.methods.catalogue import method_facts

    facts = [report_fields(each) for each in method_facts()]
    if name is not None:
        names = [each["name"] for each in facts]
        if name not in names:
            raise ConfigError(f"unknown KV method {name!r}{suggest(name, names)}; known methods: {', '.join(names)}")
        own = facts[names.index(name)]
        print_json(own) if json else print_report(name, own)
    elif json:
        print_json({"methods": facts})
    elif markdown:
        typer.echo(_markdown(facts))
    else:
        _print(facts)


def _print(facts: list[dict[str, Any]]) -> None:
    console = Console()
    columns = list(COLUMNS) if console.width >= WIDE else BRIEF
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(COLUMNS[column], no_wrap=column in ("name", "kind", "paper"))
    for each in facts:
        table.add_row(*(_short(each, column) for column in columns))
    console.print(table)
    console.print("All about one of them: kvfold methods NAME. All facts: --json, --markdown, or a wider terminal.")


def _markdown(facts: list[dict[str, Any]]) -> str:
    columns = {**COLUMNS, "parameters": "parameters", "deviations": "deviations"}
    lines = ["| " + " | ".join(columns.values()) + " |", "|---" * len(columns) + "|"]
    for each in facts:
        cells = [_short(each, column) for column in columns]
        if each["paper"]:
            cells[list(columns).index("paper")] = f"[{_short(each, 'paper')}]({each['paper']})"
        for column in ("name", "parameters"):
            index = list(columns).index(column)
            cells[index] = f"`{cells[index]}`" if cells[index] else ""
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _short(facts: dict[str, Any], column: str) -> str:
    value = facts[column] or ""
    return value.rsplit("/", 1)[-1] if column == "paper" else value
