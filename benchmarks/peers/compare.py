"""kvfold and its peers side by side: `make bench-peers`, or kvfold alone: `make bench`.

    python -m benchmarks.peers.compare --quick                          # does everything run?
    python -m benchmarks.peers.compare --only kvfold --cell "decode 8 x 8192" --repetitions 7

Writes results.json (every repetition), report.md and PNG files into --out, anew after each cell. A peer that is not
installed or that fails is left out, and the report says why.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.peers.cells import CELLS, ENVIRONMENTS, GIB, QUICK, Cell, Configuration, configurations
from benchmarks.peers.measure import Plan, Row, measure
from benchmarks.peers.models import ALIAS, Models
from benchmarks.peers.process import Runner, RunnerError
from benchmarks.peers.report import markdown
from benchmarks.peers.summary import figures

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    options = parse()
    chosen = [
        c for c in configurations(options.weights or ["bf16", "int8"]) if not options.only or _named(c, options.only)
    ]
    cells = [cell for cell in (QUICK if options.quick else CELLS) if not options.cell or cell.name in options.cell]
    if not chosen or not cells:
        raise SystemExit("nothing to measure: --only or --cell names nothing that there is")
    options.out.mkdir(parents=True, exist_ok=True)
    starter = Starter(options)
    settings = {
        "model": ALIAS,
        "threads": options.threads,
        "repetitions": options.repetitions,
        "steps": options.steps,
        "limit": options.limit,
        "machine": machine(),
        "date": datetime.now().astimezone().isoformat(timespec="minutes"),
        "load": os.getloadavg()[0],
        "bandwidth": {},
    }
    deadline = time.monotonic() + 60 * options.minutes
    plan = Plan(options.repetitions, options.steps, options.limit, int(options.memory * GIB), deadline)
    rows: list[Row] = []
    for cell in cells:
        if time.monotonic() < deadline:
            for threads, rate in bandwidth(options.threads).items():
                settings["bandwidth"][threads] = max(rate, settings["bandwidth"].get(threads, 0.0))
        rows += measure(cell, chosen, plan, starter.start, lambda line: print(line, file=sys.stderr, flush=True))
        save(settings, rows, options.out)
    print((options.out / "report.md").read_text("utf-8"))
    if not any(row.samples for row in rows):
        raise SystemExit("nothing could be measured; the report says why")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="part of a configuration's name; may be repeated")
    parser.add_argument("--cell", action="append", help='such as "decode 8 x 8192"; may be repeated')
    parser.add_argument(
        "--weights", action="append", help="of kvfold: bf16 and int8 (default), int4, fp32, auto; may be repeated"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16, help="decode steps of a repetition")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds after which a repetition of decode ends")
    parser.add_argument("--patience", type=float, default=1800.0, help="seconds for one answer, then a peer is left")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing new after them")
    parser.add_argument("--memory", type=float, default=0.7 * available() / GIB, help="GiB for runners loaded together")
    parser.add_argument("--quick", action="store_true", help="tiny cells, one repetition")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench")
    options = parser.parse_args()
    if options.quick:
        options.repetitions, options.steps = 1, 4
    return options


class Starter:
    """Starts runners, each with the interpreter of its peer."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._models = Models(ROOT / "build" / "models", python_of("llama.cpp"), ROOT)

    def start(self, each: Configuration, cell: Cell) -> Runner:
        interpreter = python_of(each.peer)
        if not (interpreter.parents[1] / "installed").exists():
            raise RunnerError(why_missing(interpreter.parents[1]))
        fields = {
            "model": self._models.path(each.model),
            "weights": each.weights,
            "kv": each.kv,
            "threads": self._options.threads,
            "batch": cell.batch,
            "context": cell.context,
        }
        arguments = [str(word) for name, value in fields.items() for word in (f"--{name}", value)]
        log = self._options.out / "logs" / f"{each.name} {cell.name}.txt".replace("/", "").replace(" ", "-")
        command = [str(interpreter), "-m", each.module, *arguments]
        return Runner(command, log, threads=self._options.threads, root=ROOT, patience=self._options.patience)


def python_of(peer: str) -> Path:
    return ROOT / ENVIRONMENTS[peer] / "bin" / "python"


def why_missing(environment: Path) -> str:
    log = environment / "install.log"
    if not log.exists():
        return f"{environment.name} is not installed"
    said = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    errors = [line for line in said if "error" in line.lower()] or said or ["nothing in its log"]
    return f"{environment.name} could not be installed: {errors[-1][:200]}"


def bandwidth(threads: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.peers.bandwidth", str(threads)]
    found: dict[str, float] = json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)
    return found


def save(settings: dict[str, Any], rows: Sequence[Row], out: Path) -> None:
    from benchmarks.peers.plots import draw

    document = {"settings": settings, "rows": [row.document() for row in rows]}
    (out / "results.json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    pictures = draw(figures(rows), max(settings["bandwidth"].values(), default=0.0), out)
    (out / "report.md").write_text(markdown(settings, rows, pictures), "utf-8")


def machine() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "an unnamed CPU")
    return f"{os.cpu_count()} cores of {name}"


def available() -> int:
    """Bytes of memory that can be had."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def _named(configuration: Configuration, parts: Sequence[str]) -> bool:
    return any(part in configuration.name for part in parts)


if __name__ == "__main__":
    main()
