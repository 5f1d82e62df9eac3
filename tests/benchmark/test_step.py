"""`kvfold bench step`: where the time goes, packed and not, and what it refuses."""

import json
from pathlib import Path

import pytest

from kvfold.benchmark.step import ATTENTION, LINEAR, REST, profile_steps
from kvfold.cli.bench import app
from kvfold.errors import ConfigError, PromptError


@pytest.mark.parametrize("weights", ["auto", "int8"])
@pytest.mark.parametrize("kv", ["none", "snapkv(budget=48)"])
def test_the_parts_make_up_the_whole(tiny_llama: Path, kv: str, weights: str) -> None:
    report = profile_steps(tiny_llama, kv, 3, 70, 4, weights=weights)
    assert report.seconds >= report.least_seconds > 0
    assert sum(report.parts.values()) == pytest.approx(1)
    assert all(share > 0 for share in (report.parts[LINEAR], report.parts[ATTENTION], report.parts[REST]))


def test_the_command_prints_json_or_a_table(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["step", "--model", str(tiny_llama), "--kv", "none", "--context", "40", "--steps", "3"]
    app([*arguments, "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["steps"] == 3
    app(arguments, standalone_mode=False)
    assert "sampling" in capsys.readouterr().out


def test_numbers_out_of_range(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="--batch 0"):
        app(["step", "--batch", "0"], standalone_mode=False)
    with pytest.raises(PromptError, match="shorten"):
        profile_steps(tiny_llama, "none", 1, 4000, 2)
