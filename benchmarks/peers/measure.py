"""One cell on all configurations, interleaved: A B C A B C, so that a machine that slows down slows all of them."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.peers.cells import Cell, Configuration, prompt_length
from benchmarks.peers.process import Runner, RunnerError

WARM_UP = 2  # steps before the first measured one
PAUSE = 0.5  # seconds after each repetition: OpenMP's idle threads still spin for a while, and would take a core

Start = Callable[[Configuration, Cell], Runner]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """steps: new tokens per sequence of one repetition. limit: seconds after which a repetition stops early. memory:
    bytes for all runners that are loaded at once. deadline: on time.monotonic, after which nothing new is begun."""

    repetitions: int
    steps: int
    limit: float
    memory: int
    deadline: float = float("inf")


@dataclass
class Row:
    """What was measured of a configuration in a cell; `reason` says why nothing, or not all, was."""

    cell: Cell
    configuration: Configuration
    about: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    prefill_seconds: float | None = None  # of all prompts of a decode cell
    reason: str | None = None

    def document(self) -> dict[str, Any]:
        return {**asdict(self), "cell": self.cell.name, "configuration": self.configuration.name}


def rounds(configurations: Sequence[Configuration], cell: Cell, memory: int) -> list[list[Configuration]]:
    """Configurations in groups that fit into memory together (or are alone), in order."""
    found: list[list[Configuration]] = []
    for each in configurations:
        held = sum(other.memory(cell) for other in found[-1]) if found else 0
        if found and held + each.memory(cell) <= memory:
            found[-1].append(each)
        else:
            found.append([each])
    return found


def measure(cell: Cell, configurations: Sequence[Configuration], plan: Plan, start: Start, say: Say) -> list[Row]:
    """The rows of a cell. Each runner is started afresh for it, so that its peak memory is this cell's."""
    rows = {each: Row(cell, each) for each in configurations}
    for group in rounds(configurations, cell, plan.memory):
        with ExitStack() as stack:
            runners: dict[Configuration, Runner] = {}
            for each in group:
                with _attempt(rows[each], plan, say) as possible:
                    if possible:
                        runners[each] = stack.enter_context(start(each, cell))
                        _prepare(runners[each], rows[each], plan)
            for repetition in range(plan.repetitions):
                for each, runner in runners.items():
                    with _attempt(rows[each], plan, say) as possible:
                        if possible:
                            sample = _sample(runner, cell, plan, repetition)
                            rows[each].samples.append(sample)
                            say(f"{cell.name}  {each.name}  {sample['tokens_per_s']:.1f} tokens/s")
                            time.sleep(PAUSE)
    return list(rows.values())


@contextmanager
def _attempt(row: Row, plan: Plan, say: Say) -> Iterator[bool]:
    """Whether a configuration can still go on; what ends it becomes its reason, and the others go on."""
    if row.reason is None and time.monotonic() > plan.deadline:
        row.reason = "no time left"
    try:
        yield row.reason is None
    except RunnerError as error:
        row.reason = str(error)
        say(f"{row.cell.name}  {row.configuration.name}  {error}")


def _prepare(runner: Runner, row: Row, plan: Plan) -> None:
    cell = row.cell
    row.about = runner.about
    runner.ask("hold", batch=1, context=128, seed=-1)  # warm: thread pools, compiled code
    runner.ask("decode", steps=WARM_UP, limit=plan.limit)
    runner.ask("drop")
    if cell.kind == "decode":
        length = prompt_length(cell, plan.repetitions * plan.steps + WARM_UP)
        row.prefill_seconds = runner.ask("hold", batch=cell.batch, context=length, seed=0)["seconds"]
        runner.ask("decode", steps=WARM_UP, limit=plan.limit)


def _sample(runner: Runner, cell: Cell, plan: Plan, repetition: int) -> dict[str, Any]:
    if cell.kind == "prefill":
        length = prompt_length(cell, 0)
        found = runner.ask("prefill", batch=cell.batch, context=length, seed=repetition)
    else:
        found = runner.ask("decode", steps=plan.steps, limit=plan.limit)
    return {**found, "tokens_per_s": found["tokens"] / found["seconds"]}
