"""The report in Markdown; every row says with what precision its weights and its KV cache are held."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.peers.measure import Row
from benchmarks.peers.summary import OURS, Figures, figures

MIB = 2**20


def markdown(settings: Mapping[str, Any], rows: Sequence[Row], pictures: Sequence[str] = ()) -> str:
    """settings: as in the JSON file. pictures: names of PNG files beside the report."""
    found = figures(rows)
    cells = list(dict.fromkeys(row.cell.name for row in rows))
    order = list(dict.fromkeys(row.configuration.name for row in rows))
    parts = [_heading(settings), _overview(sorted(found, key=lambda f: order.index(f.row.configuration.name)), cells)]
    parts += [_cell(name, [each for each in found if each.row.cell.name == name]) for name in cells]
    parts += [_missing(rows)]
    parts += [f"![{name}]({name})" for name in pictures]
    return "\n\n".join(part for part in parts if part) + "\n"


def _heading(settings: Mapping[str, Any]) -> str:
    widths = "; ".join(
        f"{threads} thread{'s' if threads != '1' else ''} {rate / 1e9:.1f} GB/s"
        for threads, rate in settings["bandwidth"].items()
    )
    return (
        f"# kvfold and its peers, side by side\n\n{settings['model']}, {settings['threads']} threads on "
        f"{settings['machine']}; {settings['date']}, load average {settings['load']:.1f} before. Memory is read at "
        f"{widths}. Medians of up to {settings['repetitions']} repetitions, interleaved, with the lowest and the "
        f"highest. A decode repetition is {settings['steps']} steps of the whole batch (fewer after "
        f"{settings['limit']:g} s), timed from step to step: no prompt is in it. The peak is of resident memory after "
        "loading."
    )


def _overview(found: Sequence[Figures], cells: Sequence[str]) -> str:
    """Medians of everything, and by how much kvfold is ahead of the best peer."""
    by_name: dict[str, dict[str, Figures]] = {}
    for each in found:
        by_name.setdefault(each.row.configuration.name, {})[each.row.cell.name] = each
    lines = [_line(["tokens/s", "weights", "KV", *cells]), _line(["---"] * 3 + ["---:"] * len(cells))]
    for own in by_name.values():
        about = next(iter(own.values())).row.about
        medians = [_rate(own[cell].median) + _ahead(own[cell]) if cell in own else "" for cell in cells]
        lines.append(_line([about["peer"], about["weights"], about["kv"], *medians]))
    return "\n".join(lines) + f"\n\nIn brackets: {OURS} over the best peer of the cell, whatever its precisions."


def _ahead(figures: Figures) -> str:
    ours = figures.row.configuration.peer == OURS and figures.ratio is not None
    return f" ({figures.ratio:.2f}x)" if ours else ""


def _cell(name: str, found: Sequence[Figures]) -> str:
    if not found:
        return ""
    head = ["", "weights", "KV", "tokens/s", "lowest to highest", "over best peer", "step", "held KV", "peak RSS", "n"]
    lines = [f"## {name}\n", _line(head), _line(["---"] * 3 + ["---:"] * 7)]
    for each in sorted(found, key=lambda each: -each.median):
        about = each.row.about
        lines.append(
            _line(
                [
                    f"{about['peer']} {about['version'].split()[-1]}",
                    about["weights"],
                    about["kv"],
                    _rate(each.median),
                    f"{_rate(each.low)} to {_rate(each.high)}",
                    "" if each.ratio is None else f"{each.ratio:.2f}x",
                    "" if each.step is None else f"{1000 * each.step:.1f} ms",
                    f"{each.kv_bytes / MIB:,.0f} MiB",
                    f"{each.peak_rss / MIB:,.0f} MiB",
                    str(len(each.row.samples)),
                ]
            )
        )
    return "\n".join(lines)


def _missing(rows: Sequence[Row]) -> str:
    """A line for each configuration and reason, with all cells."""
    cells: dict[tuple[str, str, int], list[str]] = {}
    for row in rows:
        if row.reason is not None:
            cells.setdefault((row.configuration.name, row.reason, len(row.samples)), []).append(row.cell.name)
    lines = [
        f"- {name}: {reason}{f' after {done} repetitions' if done else ''} ({', '.join(own)})"
        for (name, reason, done), own in cells.items()
    ]
    return "\n".join(["## Not measured, or not to the end\n", *lines]) if lines else ""


def _rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 100 else f"{tokens_per_s:.1f}"


def _line(columns: Sequence[str]) -> str:
    return "| " + " | ".join(columns) + " |"
