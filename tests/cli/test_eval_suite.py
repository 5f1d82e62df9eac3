"""`kvfold eval suite` and `compare`, as a user calls them."""

import json
from pathlib import Path

import pytest

from .conftest import Kvfold

COMMON = ("--tasks", "keys", "--context", "256", "--samples", "2", "--dtype", "float32")


def test_a_suite_from_start_to_comparison(kvfold_here: Kvfold, tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--model", tiny_llama, "--methods", "snapkv,tova", "--budgets", "8", "--out", out)
    first = kvfold_here("eval", "suite", *options, *COMMON)
    assert first.returncode == 0, first.stderr
    assert "snapkv" in first.stdout
    assert "report.html" in first.stdout
    again = kvfold_here("eval", "suite", *options, *COMMON, "--json")
    summary = json.loads(again.stdout)
    assert {row["family"] for row in summary["rows"]} == {"snapkv", "tova"}
    cells = sorted((out / "cells").iterdir())
    compared = kvfold_here("eval", "compare", *cells)
    assert compared.returncode == 0, compared.stderr
    assert "tova at 8 bits" in compared.stdout
    same = json.loads(kvfold_here("eval", "compare", out, out, "--json").stdout)
    assert {one["verdict"] for one in same["comparisons"]} == {"tied"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--methods", "snapkvs"), "snapkv"),
        (("--methods", "none"), "besides the dense cache"),
        (("--methods", "snapkv", "--budgets", "2,x"), "--budgets"),
        (("--methods", "snapkv", "--budgets", ""), "no budget"),
        (("--methods", "snapkv", "--context", "300.5"), "--context"),
        (("--methods", "snapkv", "--tasks", ""), "no task"),
        (("--methods", "snapkv", "--tasks", "lines"), "KVFOLD_DATA"),
    ],
)
def test_what_is_asked_wrongly_is_refused(
    kvfold_here: Kvfold,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    named: str,
) -> None:
    monkeypatch.setenv("KVFOLD_DATA", str(tmp_path / "no data"))
    result = kvfold_here("eval", "suite", "--model", tiny_llama, *COMMON, "--out", tmp_path / "out", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert named in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_comparing_what_is_no_suite(kvfold_here: Kvfold, tmp_path: Path) -> None:
    result = kvfold_here("eval", "compare", tmp_path, tmp_path)
    assert result.returncode == 2
    assert "holds no suite" in result.stderr
