"""A folder of results: whole or absent, one writer, one model, and nothing lost that was measured."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.evaluation.errors import EvaluationError
from kvfold.evaluation.folder import Folder, cell_name
from kvfold.evaluation.records import Manifest, Record

MANIFEST = Manifest("0", "tiny", "abc", {"seed": "0", "context": "256"}, {"text/256": "d"})
RECORD = Record(256, 0, "m", {"kl": 0.5}, "said\n", 10, 20, {"depth": 0.5})


def test_what_is_appended_comes_back(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    records = [replace(RECORD, sample=i, method=m) for i in range(3) for m in ("a", "b")]
    for record in records:
        folder.append("text", record)
    assert folder.records("text", 256) == {(r.sample, r.method): r for r in records}
    assert folder.records("text", 512) == folder.records("keys", 256) == {}


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_line_that_was_cut_off_costs_that_line_alone(tmp_path: Path, cut: int) -> None:
    folder = Folder(tmp_path)
    for sample in range(2):
        folder.append("text", replace(RECORD, sample=sample))
    path = tmp_path / "journal" / "text-256.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert set(folder.records("text", 256)) == {(0, "m")}
    folder.append("text", replace(RECORD, sample=2))
    assert set(folder.records("text", 256)) == {(0, "m"), (2, "m")}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"fingerprint": "xyz", "model": "other"}, "another model"),
        ({"kvfold": "9"}, "kvfold 0, this run with 9"),
        ({"settings": {"seed": "1", "context": "256"}}, "seed=0.*seed=1"),
        ({"samples": {"text/256": "e"}}, "other samples of text"),
    ],
)
def test_a_folder_of_something_else_is_refused(tmp_path: Path, change: dict[str, object], named: str) -> None:
    with Folder(tmp_path).writing(MANIFEST):
        pass
    with (
        pytest.raises(EvaluationError, match=f"{named}.*another --out"),
        Folder(tmp_path).writing(
            replace(MANIFEST, **change)  # type: ignore[arg-type]
        ),
    ):
        raise AssertionError("written to")
    assert Folder(tmp_path).manifest() == MANIFEST


def test_tasks_may_be_added(tmp_path: Path) -> None:
    with Folder(tmp_path).writing(MANIFEST):
        pass
    with Folder(tmp_path).writing(replace(MANIFEST, samples={"keys/256": "k"})):
        pass
    assert Folder(tmp_path).manifest().samples == {"text/256": "d", "keys/256": "k"}


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    with (
        Folder(tmp_path).writing(MANIFEST),
        pytest.raises(EvaluationError, match="another suite is writing"),
        Folder(tmp_path).writing(MANIFEST),
    ):
        raise AssertionError("written to")


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(EvaluationError, match="holds no suite"), Folder(tmp_path).writing(MANIFEST):
        raise AssertionError("written to")
    assert not (tmp_path / "manifest.json").exists()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EvaluationError, match="cannot write"), Folder(tmp_path / "file").writing(MANIFEST):
        raise AssertionError("written to")


def test_cells_come_back_and_damaged_ones_are_named(made: Callable[..., Folder]) -> None:
    folder = made("out", {("b", 4.0): [0.1, 0.2], ("a", 4.0): [0.1, 0.2], ("a", 2.0): [0.3, 0.4]})
    assert [(cell.bits, cell.family) for cell in folder.cells()] == [(2, "a"), (4, "a"), (4, "b")]
    (folder.path / "cells" / cell_name("a", 4.0, "text")).write_text('{"family": 1}')
    with pytest.raises(EvaluationError, match="damaged"):
        folder.cells()


@given(st.lists(st.text(max_size=80), min_size=2, max_size=2, unique=True))
def test_every_family_has_a_file_of_its_own(names: list[str]) -> None:
    first, second = (cell_name(name, 4, "text") for name in names)
    assert first != second
    assert len(first) < 120
    assert first.replace("-", "").replace(".", "").isalnum()
    assert first.isascii()
