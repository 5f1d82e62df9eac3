"""The suite: families of methods at equal total bytes, in several tasks, sample by sample against the dense cache."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from kvfold import __version__
from kvfold.config.progress import SILENT, Advance, Progress
from kvfold.errors import PromptError
from kvfold.evaluation.bench import Bench
from kvfold.evaluation.families import Family, parse_families
from kvfold.evaluation.folder import Folder
from kvfold.evaluation.measures import measure
from kvfold.evaluation.reading import Reading, forget, read
from kvfold.evaluation.records import Cell, Manifest, Placement, Record
from kvfold.evaluation.settings import SuiteSettings, check_budgets
from kvfold.evaluation.solver import solve
from kvfold.evaluation.tasks.base import EncodedSample, Task
from kvfold.evaluation.tasks.registry import build_tasks
from kvfold.methods.dense import Dense

Samples = Mapping[tuple[str, int], list[EncodedSample]]
"""By task and length."""


@dataclass(frozen=True)
class _Work:
    """What is left of one task at one length: methods to read by sample, and what is there."""

    task: Task
    length: int
    samples: list[EncodedSample]
    missing: Mapping[int, list[str]]


def run_suite(
    model: str | Path,
    families: Sequence[str],
    budgets: Sequence[float],
    tasks: Sequence[str],
    out: Path,
    settings: SuiteSettings,
    progress: Progress = SILENT,
) -> Folder:
    """Measures what is not in the folder `out` yet; interrupted at any time, the same call goes on.

    families: see `parse_families`; budgets: total bits per number of the dense cache at the context's end. Raises
    ConfigError, EvaluationError, PromptError and the errors of loading and calibrating before anything is measured.
    """
    contenders, targets = parse_families(families), check_budgets(budgets)
    chosen = build_tasks(tasks, settings.continuation)
    bench = Bench(model, settings, progress)
    samples = _samples(chosen, bench, settings, progress)
    digests = {f"{task}/{length}": _digest(found) for (task, length), found in samples.items()}
    folder = Folder(out)
    with folder.writing(Manifest(__version__, str(model), bench.fingerprint, settings.described(), digests)):
        plan = _plan(folder, bench, contenders, targets, settings.lengths, progress)
        work = [
            _missing(folder, task, length, samples[task.name, length], plan)
            for length in settings.lengths
            for task in chosen
        ]
        with progress.task("measuring", sum(len(methods) for w in work for methods in w.missing.values())) as advance:
            for length in settings.lengths:
                _measure(folder, bench, [w for w in work if w.length == length], plan, settings, advance)
        for task in chosen:
            _save_cells(folder, task.name, settings, plan)
    return folder


def _samples(tasks: Sequence[Task], bench: Bench, settings: SuiteSettings, progress: Progress) -> Samples:
    found: dict[tuple[str, int], list[EncodedSample]] = {}
    most = bench.spec.max_positions - 1
    with progress.task("preparing samples", len(tasks) * len(settings.lengths)) as advance:
        for length in settings.lengths:
            for task in tasks:
                made = task.samples(bench.tokenizer, length, settings.samples, settings.seed)
                longest = max(map(_tokens, made)) + task.generate
                if longest > most:
                    raise PromptError(
                        f"a context of {length} tokens makes {longest} with what follows it in task {task.name}, "
                        f"the model takes {most}; give a shorter --context"
                    )
                found[task.name, length] = made
                advance()
    return found


def _plan(
    folder: Folder,
    bench: Bench,
    families: Sequence[Family],
    targets: Sequence[float],
    lengths: Sequence[int],
    progress: Progress,
) -> list[Placement]:
    """A placement of every family at every budget and length; what is known stays as it is."""
    known = {(p.family, p.bits, p.length): p for p in folder.plan()}
    wanted = [(family, bits, length) for family in families for bits in targets for length in lengths]
    with progress.task("sizing methods", len(wanted)) as advance:
        for family, bits, length in wanted:
            key = (family.name, bits, length)
            if key not in known:
                dense = bench.dense_bytes(length)
                found = solve(family, bits, dense, partial(bench.bytes_of, length=length))
                known[key] = Placement.of(*key, dense, found)
            advance()
    folder.save_plan(known.values())
    return [known[family.name, bits, length] for family, bits, length in wanted]


def _missing(folder: Folder, task: Task, length: int, samples: list[EncodedSample], plan: Sequence[Placement]) -> _Work:
    there = folder.records(task.name, length)
    methods = [Dense.name] + [p.method for p in plan if p.length == length and p.method is not None]
    missing = {
        index: [method for method in dict.fromkeys(methods) if (index, method) not in there]
        for index in range(len(samples))
    }
    return _Work(task, length, samples, missing)


def _measure(
    folder: Folder,
    bench: Bench,
    work: Sequence[_Work],
    plan: Sequence[Placement],
    settings: SuiteSettings,
    advance: Advance,
) -> None:
    """All tasks at one length, which have the same lanes."""
    methods = list(dict.fromkeys(method for w in work for left in w.missing.values() for method in left))
    if not methods:
        return
    methods = [method for method in methods if method != Dense.name]
    longest = max(_tokens(sample) + w.task.generate for w in work for sample in w.samples)
    engine = bench.engine(methods, longest)
    lanes = {Dense.name: 0} | {method: lane for lane, method in enumerate(methods, 1)}
    for w in work:
        for index, left in w.missing.items():
            sample = w.samples[index]
            dense: Reading | None = None
            # The dense cache goes first and always: others are measured against its distributions, which are not
            # kept, and go on from the context that it has read.
            for method in dict.fromkeys([Dense.name, *left] if left else []):
                reading = read(
                    engine,
                    lanes[method],
                    sample,
                    generate=w.task.generate,
                    query_aware=settings.query_aware,
                    reference=None if dense is None else dense.logprobs,
                )
                dense = dense or reading
                if method in left:
                    folder.append(w.task.name, _record(w, index, method, reading, dense, bench))
                    advance()
            forget(engine)
        _save_cells(folder, w.task.name, settings, plan)
    engine.check_integrity()


def _record(w: _Work, index: int, method: str, reading: Reading, dense: Reading, bench: Bench) -> Record:
    sample = w.samples[index]
    said = reading.text
    if not w.task.generate and sample.answers:
        said = str(bench.tokenizer.decode(reading.answer.said))
    return Record(
        length=w.length,
        sample=index,
        method=method,
        measures=measure(w.task.name, sample, reading, dense),
        said=said,
        bytes=reading.kv.bytes,
        dense_bytes=reading.kv.dense_bytes,
        tags=sample.tags,
    )


def _save_cells(folder: Folder, task: str, settings: SuiteSettings, plan: Sequence[Placement]) -> None:
    """Writes the cells of a task of which every sample is there."""
    there = {length: folder.records(task, length) for length in settings.lengths}
    for family, bits in dict.fromkeys((p.family, p.bits) for p in plan):
        placements = [p for p in plan if (p.family, p.bits) == (family, bits)]
        pairs = [
            (there[p.length].get((index, p.method)), there[p.length].get((index, Dense.name)))
            for p in placements
            if p.method is not None
            for index in range(settings.samples)
        ]
        whole = [(record, dense) for record, dense in pairs if record is not None and dense is not None]
        if whole and len(whole) == len(pairs):
            records, dense = map(list, zip(*whole, strict=True))
            folder.save_cell(Cell(family, bits, task, placements, records, dense))


def _tokens(sample: EncodedSample) -> int:
    return len(sample.prompt) + len(sample.answer)


def _digest(samples: Sequence[EncodedSample]) -> str:
    return hashlib.sha256(msgspec.json.encode(samples)).hexdigest()[:16]
