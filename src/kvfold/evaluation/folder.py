"""A suite's folder: whole files or none, readings that survive an interruption, and one writer at a time.

manifest.json                what every cell was made with
plan.json                    which member of each family stands at which budget
journal/TASK-LENGTH.jsonl    records, appended as they are measured
cells/*.json                 one per family, budget and task, once all of its samples are there
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from filelock import FileLock, Timeout

from kvfold.config.files import write_atomically
from kvfold.evaluation.errors import EvaluationError
from kvfold.evaluation.records import Cell, Manifest, Placement, Record

MANIFEST = "manifest.json"
PLAN = "plan.json"
_Value = TypeVar("_Value")


class Folder:
    """Reading and writing below `path`; see the module for what is where."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def writing(self, manifest: Manifest) -> Iterator[None]:
        """Makes the folder, or goes on with one of the same manifest (new tasks are added to it), and keeps others
        from writing. Raises EvaluationError where it cannot be written or holds something else.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock", blocking=False)
            lock.acquire()
        except Timeout as error:
            raise EvaluationError(
                f"another suite is writing to {self.path}; wait for it or give another --out"
            ) from error
        except OSError as error:
            raise EvaluationError(f"cannot write to {self.path}: {error.strerror}; give another --out") from error
        with lock:
            self._adopt(manifest)
            yield

    def manifest(self) -> Manifest:
        """Raises EvaluationError where the folder has none."""
        path = self.path / MANIFEST
        if not os.path.isfile(path):
            raise EvaluationError(f"{self.path} holds no suite; give a folder that `kvfold eval suite --out` made")
        return read(path, Manifest)

    def plan(self) -> list[Placement]:
        path = self.path / PLAN
        return read(path, list[Placement]) if os.path.isfile(path) else []

    def save_plan(self, plan: Iterable[Placement]) -> None:
        write(self.path / PLAN, list(plan))

    def records(self, task: str, length: int) -> dict[tuple[int, str], Record]:
        """All records measured so far, by sample and method; what an interruption cut off is measured again."""
        path = self._journal(task, length)
        if not os.path.isfile(path):
            return {}
        found = {}
        for line in path.read_bytes().split(b"\n"):
            try:
                record = msgspec.json.decode(line, type=Record)
            except msgspec.DecodeError:
                continue
            found[record.sample, record.method] = record
        return found

    def append(self, task: str, record: Record) -> None:
        """Adds one record to the journal. Raises EvaluationError where it cannot be written."""
        path = self._journal(task, record.length)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                # The line break goes first: a line that an interruption cut off must not swallow this one.
                file.write(b"\n" + msgspec.json.encode(record))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _cannot_write(path, error) from error

    def cells(self) -> list[Cell]:
        """All cells, in order of task, budget and family."""
        found = [read(path, Cell) for path in (self.path / "cells").glob("*.json")]
        return sorted(found, key=lambda cell: (cell.task, cell.bits, cell.family))

    def save_cell(self, cell: Cell) -> None:
        write(self.path / "cells" / cell_name(cell.family, cell.bits, cell.task), cell)

    def _adopt(self, manifest: Manifest) -> None:
        path = self.path / MANIFEST
        if not os.path.isfile(path):
            if any(not child.name.startswith(".") for child in self.path.iterdir()):
                raise EvaluationError(f"{self.path} has files but holds no suite; give an empty or a new --out")
            write(path, manifest)
            return
        there = self.manifest()
        check_same(there, manifest, f"{self.path} was made", "this run", "give another --out or the same options")
        write(path, replace(there, samples={**there.samples, **manifest.samples}))

    def _journal(self, task: str, length: int) -> Path:
        return self.path / "journal" / f"{task}-{length}.jsonl"


def check_same(a: Manifest, b: Manifest, first: str, second: str, remedy: str) -> None:
    """Raises EvaluationError, a sentence such as "`first` with seed=0, `second` with seed=1; `remedy`", unless figures
    of both may stand side by side."""
    if a.fingerprint != b.fingerprint:
        raise EvaluationError(f"{first} with another model ({a.model}), {second} with {b.model}; {remedy}")
    if a.kvfold != b.kvfold:
        raise EvaluationError(f"{first} with kvfold {a.kvfold}, {second} with {b.kvfold}; {remedy}")
    for name, value in a.settings.items():
        if (other := b.settings.get(name)) != value:
            raise EvaluationError(f"{first} with {name}={value}, {second} with {name}={other}; {remedy}")
    for name in a.samples.keys() & b.samples.keys():
        if a.samples[name] != b.samples[name]:
            raise EvaluationError(f"{first} with other samples of {name.split('/')[0]}, {second} not; {remedy}")


def cell_name(family: str, bits: float, task: str) -> str:
    """A file name that says what the cell is and belongs to no other cell."""
    short = re.sub(r"[^A-Za-z0-9]+", "-", family).strip("-")[:60]
    return f"{task}-{bits:g}-{short}-{hashlib.sha256(family.encode()).hexdigest()[:8]}.json"


def read(path: Path, kind: type[_Value]) -> _Value:
    """A value from a JSON file. Raises EvaluationError for a file that cannot be read as one."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise EvaluationError(f"cannot read {path}: {error.strerror}; check the path and its permissions") from error
    except msgspec.DecodeError as error:
        raise EvaluationError(f"{path} is damaged or no file of a suite ({error}); delete it and run again") from error


def write(path: Path, value: Any) -> None:
    """The file appears whole or not at all, as JSON."""
    write_bytes(path, msgspec.json.format(msgspec.json.encode(value), indent=1))


def write_bytes(path: Path, content: bytes) -> None:
    """The file appears whole or not at all. Raises EvaluationError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> EvaluationError:
    return EvaluationError(f"cannot write {path}: {error.strerror}; free some space or give another --out")
