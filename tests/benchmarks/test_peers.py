"""The side-by-side benchmark with runners that hold no model: protocol, failures, figures, report."""

import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks.peers.cells import CELLS, GIB, Cell, Configuration, configurations, prompt_length
from benchmarks.peers.compare import save
from benchmarks.peers.measure import Plan, Row, Start, measure, rounds
from benchmarks.peers.process import Runner, RunnerError
from benchmarks.peers.protocol import prompts
from benchmarks.peers.report import markdown
from benchmarks.peers.summary import figures

ROOT = Path(__file__).resolve().parents[2]
DECODE = Cell("decode", 2, 256)
PREFILL = Cell("prefill", 1, 256)
PLAN = Plan(repetitions=3, steps=4, limit=10.0, memory=64 * GIB)
SETTINGS = {
    "model": "M", "threads": 2, "repetitions": 3, "steps": 4, "limit": 10.0, "machine": "a machine", "date": "today",
    "load": 0.1,
    "bandwidth": {"1": 10e9, "2": 20e9},
}  # fmt: skip


@pytest.fixture
def start(tmp_path: Path) -> Start:
    def start(configuration: Configuration, cell: Cell) -> Runner:
        fields = {"model": "-", "weights": "bf16", "kv": configuration.kv, "threads": 1, "batch": 1, "context": 1}
        words = [str(word) for name, value in fields.items() for word in (f"--{name}", value)]
        command = [sys.executable, "-m", "tests.benchmarks.fake_runner", *words]
        return Runner(command, tmp_path / f"{configuration.kv}.txt", threads=1, root=ROOT, patience=60.0)

    return start


def row(peer: str, cell: Cell, rates: list[float], kv: str = "bf16", reason: str | None = None) -> Row:
    about = {"peer": peer, "version": "9", "weights": "int8", "kv": kv, "weight_bytes": 10**8}
    shared = {"steps": 4, "kv_bytes": 2**25, "held": 500.0}
    samples = [{"tokens_per_s": r, "seconds": 8 / r, "peak_rss": 2**30 + int(r), **shared} for r in rates]
    return Row(cell, Configuration(peer, "int8", kv), about if rates else {}, samples, None, reason)


def test_a_runner_answers_and_keeps_its_stdout_clean(start: Start) -> None:
    with start(Configuration("fake", "bf16", "bf16"), DECODE) as runner:
        assert runner.about["weights"] == "bf16"
        assert runner.ask("prefill", batch=2, context=10, seed=1)["kv_bytes"] == 2000
        assert runner.ask("hold", batch=2, context=10, seed=1)["tokens"] == 20
        answer = runner.ask("decode", steps=4, limit=10)
        assert (answer["steps"], answer["tokens"], answer["held"], answer["kv_bytes"]) == (4, 8, 24.0, 2800)
        assert answer["seconds"] >= 0.004
        assert answer["peak_rss"] > 2**20
        assert runner.ask("drop").keys() == {"peak_rss"}


def test_a_repetition_stops_at_its_limit(start: Start) -> None:
    with start(Configuration("fake", "bf16", "slow"), DECODE) as runner:
        runner.ask("hold", batch=1, context=10, seed=1)
        assert runner.ask("decode", steps=100, limit=0.1)["steps"] == 1


@pytest.mark.parametrize(
    ("kv", "reason"),
    [("unloadable", "ValueError: no such cache"), ("crash", "ended with exit code 1: out of luck")],
)
def test_why_a_runner_does_not_start(start: Start, kv: str, reason: str) -> None:
    with pytest.raises(RunnerError, match=reason):
        start(Configuration("fake", "bf16", kv), DECODE)


def test_a_runner_that_takes_too_long_is_ended(start: Start) -> None:
    with start(Configuration("fake", "bf16", "slow"), DECODE) as runner:
        runner.ask("hold", batch=1, context=10, seed=1)
        runner.patience = 0.1
        with pytest.raises(RunnerError, match="took more than 0 s"):
            runner.ask("decode", steps=1000, limit=1000)
        assert runner._process.poll() is not None


def test_repetitions_are_interleaved_and_failures_stay_alone(start: Start) -> None:
    said: list[str] = []
    chosen = [Configuration("fake", "bf16", kv) for kv in ("a", "fragile", "b", "unloadable")]
    rows = measure(DECODE, chosen, PLAN, start, said.append)
    assert [len(row.samples) for row in rows] == [3, 0, 3, 0]
    assert [row.reason for row in rows] == [None, "RuntimeError: cannot step", None, "ValueError: no such cache"]
    measured = [line.split("  ")[1] for line in said if "tokens/s" in line]
    assert measured == ["fake bf16 / a", "fake bf16 / b"] * 3
    assert rows[0].prefill_seconds is not None
    # Each repetition goes on from what the one before it held: after 2 steps of warming up, 4 a time.
    length = prompt_length(DECODE, 14)
    assert [sample["held"] for sample in rows[0].samples] == [2 * (length + 2 + 4 * n + 2) for n in range(3)]


def test_nothing_is_begun_after_the_deadline(start: Start) -> None:
    late = Plan(1, 1, 1.0, GIB, deadline=time.monotonic() - 1)
    (only,) = measure(PREFILL, [Configuration("fake", "bf16", "a")], late, start, print)
    assert (only.samples, only.reason) == ([], "no time left")


def test_rounds_fit_into_memory() -> None:
    chosen = [Configuration("fake", "bf16", str(index)) for index in range(5)]
    each = chosen[0].memory(DECODE)
    assert [len(group) for group in rounds(chosen, DECODE, 2 * each)] == [2, 2, 1]
    assert [len(group) for group in rounds(chosen, DECODE, 1)] == [1] * 5
    assert rounds(chosen, DECODE, 5 * each) == [chosen]


def test_prompts_are_the_same_for_all_and_none_like_another() -> None:
    assert prompts(2, 50, 3) == prompts(2, 50, 3)
    first, second = prompts(2, 50, 3)
    assert first[0] != second[0]
    assert prompts(1, 50, 4) != [first]


@pytest.mark.parametrize("cell", CELLS)
def test_prompts_leave_room_for_new_tokens(cell: Cell) -> None:
    length = prompt_length(cell, 5 * 16 + 2)
    assert cell.context * 0.9 < length < cell.context


def test_configurations_have_names_of_their_own_and_runners() -> None:
    found = configurations(["bf16", "int8"])
    assert len({each.name for each in found}) == len(found)
    for each in found:
        assert (ROOT / each.module.replace(".", "/")).with_suffix(".py").exists()


def test_medians_spread_and_ratios() -> None:
    rows = [
        row("kvfold", DECODE, [30, 90, 60], "zeroc"),
        row("vllm", DECODE, [20, 20, 21, 19]),
        row("llama.cpp", DECODE, [5, 500, 10]),
        row("kvfold", PREFILL, [100]),
    ]
    ours, vllm, llama, alone = figures(rows)
    assert (ours.median, ours.low, ours.high) == (60, 30, 90)
    assert (ours.ratio, vllm.ratio, llama.ratio, alone.ratio) == (3.0, 1.0, 0.5, None)
    assert ours.step == pytest.approx(8 / 60 / 4)
    assert ours.peak_rss == 2**30 + 90
    assert alone.step is None


def test_the_report_states_precisions_and_what_is_missing() -> None:
    rows = [row("kvfold", DECODE, [60.0], "zeroc"), row("vllm", DECODE, [20], reason="no time left")]
    rows += [row("x", cell, [], reason="no x") for cell in (DECODE, PREFILL)]
    text = markdown(SETTINGS, rows, ["roofline.png"])
    assert "| kvfold | int8 | zeroc | 60.0 (3.00x) |" in text
    assert "| kvfold 9 | int8 | zeroc | 60.0 | 60.0 to 60.0 | 3.00x | 33.3 ms | 32 MiB | 1,024 MiB | 1 |" in text
    assert "- x int8 / bf16: no x (decode 2 x 256, prefill 1 x 256)" in text
    assert "- vllm int8 / bf16: no time left after 1 repetitions (decode 2 x 256)" in text
    assert "1 thread 10.0 GB/s; 2 threads 20.0 GB/s" in text
    assert text.endswith("![roofline.png](roofline.png)\n")


def test_files_are_written(tmp_path: Path) -> None:
    cells = [Cell("decode", batch, context) for batch in (1, 8) for context in (2048, 8192)]
    rows = [row(peer, cell, [10.0, 12.0]) for peer in ("kvfold", "vllm") for cell in [*cells, PREFILL]]
    save(SETTINGS, rows, tmp_path)
    document = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert document["rows"][0]["samples"][1]["tokens_per_s"] == 12.0
    for name in ("throughput-context", "throughput-batch", "roofline", "memory"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"{name}.png" in (tmp_path / "report.md").read_text("utf-8")


def test_a_run_in_which_all_fails_still_has_a_report(tmp_path: Path) -> None:
    save(SETTINGS, [row("vllm", DECODE, [], reason="not installed")], tmp_path)
    assert "not installed" in (tmp_path / "report.md").read_text("utf-8")
