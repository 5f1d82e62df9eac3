"""Paths and bytes that the operating system itself refuses: one sentence and exit code 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvfold.cli.app import main

from .conftest import Kvfold

TOO_LONG = "x" * 5000


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--model", TOO_LONG), "no model"),
        (("--model", "~nobody-of-this-name/model"), "no model"),
        (("--prompt", "\udcff"), "UTF-8"),  # what Python makes of a byte that is no UTF-8
        (("--kv", "zeroc(bits=4)", "--calibration", TOO_LONG), "no calibration"),
    ],
)
def test_refused_in_one_sentence(kvfold_here: Kvfold, tiny_llama: Path, arguments: tuple[str, ...], named: str) -> None:
    result = kvfold_here("generate", "--model", tiny_llama, "--prompt", "A page", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert named in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_an_out_that_is_a_file_is_refused_before_calibrating(
    kvfold_here: Kvfold, tiny_text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "file"
    out.write_text("kept")
    result = kvfold_here("calibrate", "--model", tmp_path / "read later", "--text", tiny_text, "--out", out)
    assert result.returncode == 2
    assert "choose another --out" in result.stderr
    assert out.read_text() == "kept"


def test_a_cache_that_cannot_be_written_is_refused_before_calibrating(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def calibrate_model(*_: object, **__: object) -> None:
        raise AssertionError("calibrated in vain")

    monkeypatch.setattr("kvfold.calibration.run.calibrate_model", calibrate_model)
    (tmp_path / "file").write_text("kept")
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "file" / "cache"))
    common = ("--model", str(tiny_llama))
    for command in (("calibrate", *common), ("generate", *common, "--kv", "zeroc(bits=4)", "--prompt", "A page")):
        assert main(command) == 2
        assert "set KVFOLD_CACHE" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no device that is always full")
def test_stdout_on_a_full_disk(tiny_llama: Path) -> None:
    command = [str(Path(sys.executable).with_name("kvfold")), "info", "--model", str(tiny_llama), "--json"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "free some space" in result.stderr
