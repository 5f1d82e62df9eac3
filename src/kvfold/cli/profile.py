"""`kvfold profile`: measure the engine's steps and fit the latency model that simulations go by."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvfold.cli import options
from kvfold.cli.output import print_json, report_fields
from kvfold.cli.progress import ConsoleProgress
from kvfold.config.method import parse_method

if TYPE_CHECKING:
    from kvfold.planner.document import MethodProfile
    from kvfold.planner.fit import Point


def profile(
    model: options.Model = options.DEFAULT_MODEL,
    kv: Annotated[
        list[str] | None,
        typer.Option("--kv", help="Method to measure; give several to compare them.", metavar="METHOD"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the profile goes (JSON).", metavar="FILE")] = Path("profile.json"),
    quick: Annotated[bool, typer.Option("--quick", help="A coarse grid: a third of the time.")] = False,
    threads: Annotated[int | None, typer.Option(help="Threads (default: one per core).", metavar="N")] = None,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="Count processor time (one thread): other programs do not show.")
    ] = False,
    dtype: options.Dtype = "auto",
    weights: options.Weights = "auto",
    calibration: options.Calibration = None,
    json: options.Json = False,
) -> None:
    """Time real steps of the engine over prompts, batches and contexts, and fit what they cost.

    Steps marked * were not used by the fit: their errors say what a prediction is worth.
    """
    methods = list(dict.fromkeys(kv or ["none", "zeroc(bits=4)"]))
    for method in methods:
        parse_method(method)

    from kvfold.planner.document import check_out, save_profile
    from kvfold.planner.profile import profile_engine

    check_out(out)
    found = profile_engine(
        model,
        methods,
        quick=quick,
        cpu_time=cpu_time,
        dtype=dtype,
        weights=weights,
        threads=threads,
        calibration=calibration,
        progress=ConsoleProgress(),
    )
    save_profile(found, out)
    if json:
        # Layouts are for the simulator; they would bury the figures.
        shown = [{k: v for k, v in report_fields(m).items() if k not in ("sealed", "staged")} for m in found.methods]
        print_json({**report_fields(found), "methods": shown})
        return
    console = Console()
    console.print(
        Text(
            f"{found.model}, computed in {found.dtype}, cache in {found.kv_dtype}, weights {found.weights}, threads "
            f"{found.machine.threads}, {found.machine.clock} time, {found.machine.processor}"
        )
    )
    for each in found.methods:
        _show(each, console)
    typer.echo(f"written to {out}")


def _show(method: "MethodProfile", console: Console) -> None:
    latency, transfer = method.latency, method.transfer
    prefill = latency.prefill
    lines = [
        f"prefill ms = {_ms(prefill.fixed)} + {_ms(prefill.per_token)} x tokens + "
        f"{1e3 * prefill.per_square:.3g} x squares"
    ]
    sides = [("decode", latency.decode)]
    if latency.decode_above is not None:
        sides = [(f"decode, batch <= {latency.knee}", latency.decode), ("decode, above", latency.decode_above)]
    for name, cost in sides:
        lines.append(
            f"{name}: ms = {_ms(cost.fixed)} + {1e9 * cost.per_byte:.3g} x MB of KV + {_ms(cost.per_sequence)} x batch"
        )
    lines.append(f"copying pages: ms = {_ms(transfer.overhead)} + bytes at {transfer.bytes_per_second / 1e9:.3g} GB/s")
    table = Table(title=Text(method.method), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("step", "tokens", "squares", "KV MB", "batch", "measured ms", "model ms", "error"):
        table.add_column(column, justify="left" if column == "step" else "right", no_wrap=True)
    for point in method.points:
        table.add_row(*_row(method, point))
    console.print(table)
    for line in lines:
        console.print(Text(line))
    for name, points in _kinds(method).items():
        console.print(Text(f"  {name}: {_errors(method, points)}"))


def _row(method: "MethodProfile", point: "Point") -> list[str]:
    work, model = point.work, method.latency.seconds(point.work)
    kind = "mixed" if work.tokens and work.batch else "prefill" if work.tokens else "decode"
    return [
        kind + (" *" if point.held_out else ""),
        f"{work.tokens:,}" if work.tokens else "",
        f"{work.squares:,}" if work.tokens else "",
        f"{work.kv_bytes / 1e6:.1f}" if work.batch else "",
        str(work.batch or ""),
        _ms(point.seconds),
        _ms(model),
        f"{model / point.seconds - 1:+.1%}",
    ]


def _kinds(method: "MethodProfile") -> dict[str, list["Point"]]:
    mixed = [p for p in method.points if p.work.tokens and p.work.batch]
    pure = [p for p in method.points if not (p.work.tokens and p.work.batch)]
    kinds = {
        "fitted": [p for p in pure if not p.held_out],
        "held out (*)": [p for p in pure if p.held_out],
        "prompts beside decoding (*, never fitted)": mixed,
    }
    return {name: points for name, points in kinds.items() if points}


def _errors(method: "MethodProfile", points: list["Point"]) -> str:
    from kvfold.planner.fit import relative_error

    errors = sorted(abs(relative_error(method.latency, point)) for point in points)
    return f"{len(errors)} steps, error median {errors[len(errors) // 2]:.1%}, largest {errors[-1]:.1%}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g}" if seconds < 1 else f"{1000 * seconds:,.0f}"
