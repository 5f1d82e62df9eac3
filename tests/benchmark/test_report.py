"""The table's rows, and the object that is saved."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.benchmark.errors import BenchmarkError
from kvfold.benchmark.load import Load
from kvfold.benchmark.measures import summarize
from kvfold.benchmark.options import Limits
from kvfold.benchmark.outcome import Outcome
from kvfold.benchmark.report import Report, Run, merged, report_document, save_document


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4))
def test_rows_are_all_there_in_the_order_of_two_columns(choices: list[list[bool]]) -> None:
    rows = "abcdef"
    columns = [[row for row, chosen in zip(rows, column, strict=True) if chosen] for column in choices]
    names = merged(columns)
    assert sorted(names) == sorted({row for column in columns for row in column})
    for column in columns[:2]:
        assert [name for name in merged(columns[:2]) if name in column] == column
    assert [name for name in names if name in columns[0]] == columns[0]


def test_a_row_of_the_second_column_alone_stands_where_it_belongs() -> None:
    assert merged([["completed", "duration", "KV"], ["completed", "failed: 429", "duration"]]) == [
        "completed",
        "failed: 429",
        "duration",
        "KV",
    ]


def report() -> Report:
    outcome = Outcome(0, 1, 1, 0.0, sent=0.1, ended=1 / 3, arrivals=[1 / 3], kv={"bytes": float("inf")})
    load = Load([outcome], 0, 1.0, 0.0, False)
    return Report(
        "t", {"rate": float("inf"), "trace": Path("x")}, [], [Run(None, summarize(load, Limits()), [outcome])]
    )


def test_the_saved_object_is_strict_json(tmp_path: Path) -> None:
    save_document(report_document(report(), with_requests=True), tmp_path / "a.json")

    def refuse(name: str) -> None:
        raise AssertionError(name)

    saved = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert saved["settings"] == {"rate": "inf", "trace": "x"}
    assert saved["runs"][0]["requests"][0]["arrivals"] == [0.333333]
    assert saved["runs"][0]["summary"]["ttft"]["mean"] == 1 / 3


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(BenchmarkError, match="--out"):
        save_document({}, tmp_path / "a.json")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
