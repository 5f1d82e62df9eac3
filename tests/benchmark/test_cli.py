"""The command: what it prints, saves and returns."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvfold.benchmark import plot
from kvfold.benchmark.errors import BenchmarkError
from kvfold.cli.bench import app
from kvfold.errors import ConfigError

from .fake import HANG, MODEL, OK, TOO_MANY, Fake, serving

SMALL = ["--requests", "6", "--input-tokens", "20:40", "--output-tokens", "5", "--concurrency", "2"]


def bench(fake: Fake, *arguments: str) -> object:
    return app(["serve", "--url", fake.url, *SMALL, *arguments], standalone_mode=False)


def test_the_table_has_a_column_for_each_method(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Fake(behaviour=lambda n: TOO_MANY if n == 3 else OK)) as fake:
        assert not bench(fake, "--kv", "none", "--kv", "zeroc(bits=4)", "--ttft-limit", "60")
    out = capsys.readouterr().out
    for text in ("5 of 6", "6 of 6", "failed: 429", "goodput", "TTFT p99", "zeroc(bits=4)", "KV compression", MODEL):
        assert text in out


def test_what_is_saved_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "folder"
    with serving(Fake()) as fake:
        bench(fake, "--json", "--out", str(out))
    printed = json.loads(capsys.readouterr().out)
    saved = json.loads((out / "bench.json").read_text())
    requests = saved["runs"][0].pop("requests")
    assert saved == printed
    assert len(requests) == 6
    assert [r["output_tokens"] for r in requests] == [a.tokens for a in fake.asked] == [5] * 6
    assert sum(r["prompt_tokens"] for r in requests) == printed["runs"][0]["summary"]["prompt_tokens"]
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == ["bench.json", "bench.png"]


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVFOLD_API_KEY", "secret")
    with serving(Fake(key="secret")) as fake:
        bench(fake, "--out", str(tmp_path), "--timeout", "inf")
    assert len(fake.asked) == 6
    saved = (tmp_path / "bench.json").read_text()
    assert "secret" not in saved
    assert json.loads(saved)["settings"]["target"]["timeout"] == "inf"


def test_without_matplotlib_there_is_a_sentence_and_no_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot, "can_plot", lambda: False)
    with serving(Fake()) as fake:
        bench(fake, "--out", str(tmp_path))
    assert "pip install 'kvfold[bench]'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_nothing_succeeded_is_an_error_after_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    with (
        serving(Fake(behaviour=lambda _: TOO_MANY)) as fake,
        pytest.raises(BenchmarkError, match=r"no request succeeded \(429\)"),
    ):
        bench(fake)
    out = capsys.readouterr().out
    assert "0 of 6" in out
    assert "the queue is full" in out


def test_a_place_that_cannot_be_written_is_known_first(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with serving(Fake()) as fake, pytest.raises(BenchmarkError, match="--out"):
        bench(fake, "--out", str(tmp_path / "file"))
    assert fake.asked == []


@pytest.mark.parametrize("arguments", [["--rate", "0"], ["--rate", "nan"], ["--output-tokens", "0"], ["--speed", "2"]])
def test_impossible_options_are_refused(arguments: list[str]) -> None:
    with serving(Fake()) as fake, pytest.raises(ConfigError):
        bench(fake, *arguments)
    assert fake.asked == []


def test_an_interrupted_run_shows_what_it_measured() -> None:
    with serving(Fake(behaviour=lambda n: OK if n < 4 else HANG)) as fake:
        code = "import sys; from kvfold.cli.bench import app; sys.exit(app(sys.argv[1:], standalone_mode=False))"
        process = subprocess.Popen(
            [sys.executable, "-c", code, "serve", "--url", fake.url, *SMALL, "--json"],
            stdout=subprocess.PIPE,
            text=True,
        )
        while len(fake.asked) < 6 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    summary = json.loads(out)["runs"][0]["summary"]
    assert summary["interrupted"]
    assert summary["completed"] == 4
    assert summary["errors"] == {"interrupted": 2}


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from kvfold.cli.bench import app; app(['serve', '--help'], standalone_mode=False); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'matplotlib', 'httpx2')))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0
    assert "--shared-prefix" in result.stdout
