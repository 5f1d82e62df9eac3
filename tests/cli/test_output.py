"""JSON and tables."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvfold.cli.output import print_json, print_report, report_fields, shown


@dataclass
class Report:
    path: Path
    kv_bytes: int
    perplexity: float
    curve: list[tuple[int, float]]


REPORT = Report(Path("a") / "b", 3 * 2**20, float("inf"), [(4, 0.5)])


def test_json_is_one_valid_object(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"report": REPORT, "text": "é\ud800", "none": None})
    parsed = json.loads(capsys.readouterr().out)
    assert parsed["report"] == {"path": "a/b", "kv_bytes": 3 * 2**20, "perplexity": None, "curve": [[4, 0.5]]}
    assert parsed["text"] == "é\ud800"


def test_tables_show_scalars_with_units(capsys: pytest.CaptureFixture[str]) -> None:
    print_report("title", report_fields(REPORT))
    out = capsys.readouterr().out
    assert "3.00 MiB" in out
    assert "curve" not in out


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("tokens", 12345, "12,345"),
        ("tokens_in_memory", 12345, "12,345"),
        ("memory", 2**30, "1.00 GiB"),
        ("compression", 3.756, "3.76x"),
        ("seconds", 12.34, "12.3"),
        ("perplexity", 17.456789, "17.4568"),
        ("tied", True, "True"),
        ("family", "llama", "llama"),
    ],
)
def test_values_are_shown_as_people_read_them(name: str, value: object, text: str) -> None:
    assert shown(name, value) == text
