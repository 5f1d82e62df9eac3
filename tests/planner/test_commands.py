"""`kvfold profile`, `simulate` and `plan` as users run them, and everything they refuse: one sentence, exit code 2."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kvfold.cli.app import main
from kvfold.planner.document import load_profile, save_profile

from .build import method_profile, profile

Run = Callable[..., tuple[int, str, str]]
CSV = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str, str, str]:
    """Options that name a trace of 40 requests, two per second, and a profile of two methods."""
    rows = [f"2023-11-16 18:17:{i // 2:02}.{5 * (i % 2)}00000,{100 + 10 * (i % 7)},{5 + i % 4}" for i in range(40)]
    (tmp_path / "trace.csv").write_text(CSV + "\n".join(rows) + "\n")
    save_profile(profile(method_profile("none"), method_profile("kivi(bits=2)")), tmp_path / "profile.json")
    return "--trace", "trace.csv", "--profile", "profile.json"


def test_profile_measures_the_engine_and_simulate_takes_it(tiny_llama: Path, run: Run, files: tuple[str, ...]) -> None:
    """Real steps of a tiny model, a sealed and a staged method: nothing about how long they take."""
    methods = ("--kv", "none", "--kv", "snapkv(budget=48)")
    code, out, err = run("profile", "--model", tiny_llama, *methods, "--quick", "--out", "own.json", "--threads", "1")
    assert (code, "held out" in out) == (0, True), err
    found = load_profile(Path("own.json"))
    assert [m.method for m in found.methods] == ["none", "snapkv(budget=48)"]
    assert found.positions == 512
    assert (found.machine.threads, found.model) == (1, tiny_llama.name)
    for method in found.methods:
        kinds = {(bool(p.work.tokens), bool(p.work.batch)) for p in method.points}
        assert kinds == {(True, False), (False, True), (True, True)}
        assert all(p.seconds > 0 for p in method.points)
        assert method.latency.prefill.seconds(100, 10_000) > 0
    code, out, err = run("simulate", *files[:2], "--profile", "own.json", "--kv", "snapkv( budget=48 )", "--json")
    assert code == 0, err
    assert json.loads(out)["runs"][0]["requests"] == 40


def test_simulate_tells_what_happens(run: Run, files: tuple[str, ...]) -> None:
    where = ("--placement", "disaggregated(prefill=1, decode=1)", "--link-gbps", "0.1", "--ttft", "1", "--tpot", "0.1")
    code, out, err = run("simulate", *files, *where, "--rate", "1", "--rate", "4", "--out", "runs.json", "--json")
    assert code == 0, err
    document = json.loads(out)
    slow, fast = document["runs"]
    assert (slow["rate"], fast["rate"]) == (pytest.approx(1), pytest.approx(4))
    assert slow["attainment"] >= fast["attainment"]
    assert slow["transfers"] == 40
    assert len(slow["peak_pages"]) == 2
    runs = json.loads(Path("runs.json").read_text())["runs"]
    assert [len(records) for records in runs] == [40, 40]
    code, out, _ = run("simulate", *files, *where, "--kv", "kivi(bits=2)", "--rate-scale", "0.5")
    assert code == 0
    assert all(word in out for word in ("TTFT p99 (ms)", "handover", "bytes sent", "peak pages", "attainment, both"))


def test_simulate_takes_the_traces_own_times(run: Run, files: tuple[str, ...]) -> None:
    document = json.loads(run("simulate", *files, "--json")[1])
    assert document["runs"][0]["rate"] == pytest.approx(2.0)
    assert document["runs"][0]["attainment"] is None


def test_plan_searches_and_draws(run: Run, files: tuple[str, ...]) -> None:
    goal = ("--ttft", "0.5", "--tpot", "0.1", "--workers", "2")
    code, out, err = run("plan", *files, *goal, "--plot", "plan.png", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert len(document["candidates"]) == 4
    rates = [c["goodput"] for c in document["candidates"]]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0
    assert document["candidates"][0]["attainment"] >= 0.9
    assert Path("plan.png").stat().st_size > 1000
    code, out, _ = run("plan", *files, *goal[:4], "--rate", "9", "--json")
    assert code == 0
    assert json.loads(out)["candidates"][0]["goodput"] >= 9
    code, out, _ = run("plan", *files, *goal, "--kv", "none")
    assert code == 0
    assert "best: " in out
    assert "run it: kvfold serve " in out


SIMULATE: tuple[object, ...] = ("simulate",)
PLAN: tuple[object, ...] = ("plan", "--ttft", "1", "--tpot", "1", "--workers", "2")


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (
            (*SIMULATE, "--placement", "scattered(workers=2)"),
            "unknown placement 'scattered(workers=2)'; write colocated",
        ),
        ((*SIMULATE, "--placement", "colocated(workers=0)"), "is no number of workers; give 1 to"),
        ((*SIMULATE, "--placement", "colocated(workers=-1)"), "is no number of workers"),
        ((*SIMULATE, "--placement", "colocated(prefill=1)"), "has no place in colocated"),
        ((*SIMULATE, "--placement", "disaggregated(prefill=1)"), "does not say how many decode workers"),
        ((*SIMULATE, "--placement", "disaggregated(prefill=1,prefill=2)"), "has no place"),
        ((*SIMULATE, "--placement", ""), "unknown placement"),
        ((*SIMULATE, "--kv", "zeroc(bits=4)"), "the profile has no method 'zeroc(bits=4)', only none, kivi(bits=2); "),
        ((*SIMULATE, "--kv", "zeroc(bits="), "zeroc"),
        ((*SIMULATE, "--rate", "0"), "a rate of 0 requests per second cannot be played"),
        ((*SIMULATE, "--rate", "nan"), "a rate of nan"),
        ((*SIMULATE, "--rate-scale", "-1"), "cannot be played"),
        ((*SIMULATE, "--rate", "1", "--rate-scale", "2"), "give one of them"),
        ((*SIMULATE, "--lengths-scale", "nan"), "--lengths-scale nan is no factor"),
        ((*SIMULATE, "--lengths-scale", "0"), "--lengths-scale 0 is no factor"),
        ((*SIMULATE, "--requests", "0"), "--from and --requests"),
        ((*SIMULATE, "--from", "99"), "lower --from"),
        ((*SIMULATE, "--link-gbps", "0"), "--link-gbps 0 carries nothing"),
        ((*SIMULATE, "--link-gbps", "nan"), "--link-gbps nan carries nothing"),
        ((*SIMULATE, "--link-overhead", "-1"), "--link-overhead -1 is no time"),
        ((*SIMULATE, "--ttft", "nan"), "--ttft nan is no time limit"),
        ((*SIMULATE, "--kv-memory", "4KiB"), "raise --kv-memory"),
        ((*SIMULATE, "--kv-memory", "much"), "is not a size"),
        ((*SIMULATE, "--out", "nowhere/runs.json"), "give another --out"),
        ((*PLAN, "--tpot", "-1"), "--tpot -1 is no time limit"),
        ((*PLAN, "--ttft", "0"), "--ttft 0 is no time limit"),
        ((*PLAN, "--attainment", "1.5"), "--attainment 1.5 is no share"),
        ((*PLAN, "--attainment", "nan"), "--attainment nan is no share"),
        ((*PLAN, "--workers", "0"), "--workers 0 is out of range"),
        ((*PLAN, "--node-workers", "-1"), "--node-workers -1 is out of range"),
        ((*PLAN, "--ttft", "0.001"), "a TTFT of 0.001 s cannot be met"),
        ((*PLAN, "--tpot", "0.001"), "a TPOT of 0.001 s cannot be met"),
        ((*PLAN, "--rate", "2"), "give --workers or --rate"),
        ((*PLAN[:-2], "--rate", "0"), "a rate of 0 requests per second"),
        (PLAN[:-2], "give --workers or --rate"),
        ((*PLAN, "--plot", "plan.txt"), "is no picture"),
        ((*PLAN, "--plot", "nowhere/plan.png"), "its folder does not exist"),
        ((*PLAN, "--kv", "h2o(budget=9)"), "the profile has no method"),
        ((*PLAN, "--requests", "1"), "take more --requests"),
        (("profile", "--out", "nowhere/p.json"), "its folder does not exist; give another --out"),
        (("profile", "--kv", "zerok"), "zerok"),
        (("profile", "--model", "nowhere"), "nowhere"),
        (("profile", "--threads", "0"), "threads=0"),
        (("profile", "--cpu-time", "--threads", "2"), "give --threads 1"),
    ],
)
def test_what_is_refused(run: Run, files: tuple[str, ...], command: tuple[str, ...], named: str) -> None:
    given = () if command[0] == "profile" else files
    assert_refused(run(*command, *given), named)


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("t.csv", "TIMESTAMP,ContextTokens\n2023-11-16 18:17:03,5\n", "line 1: the header is not TIMESTAMP,Context"),
        ("t.csv", CSV + "2023-11-16 18:17:03,5\n", "line 2: 2 columns instead of 3"),
        ("t.csv", CSV + "2023-11-16 18:17:03,nan,5\n", "line 2: ContextTokens 'nan' is no number of tokens"),
        ("t.csv", CSV + "2023-11-16 18:17:03,-5,5\n", "line 2: ContextTokens '-5'"),
        ("t.csv", CSV + "nan,5,5\n", "line 2: 'nan' is no time"),
        ("t.csv", CSV, "has no request"),
        ("t.jsonl", '{"timestamp": -1, "input_length": 5, "output_length": 5}\n', "'timestamp' -1 is negative"),
        ("t.jsonl", '{"timestamp": NaN, "input_length": 5, "output_length": 5}\n', "'timestamp' is no number"),
        ("t.jsonl", '{"input_length": 5, "output_length": 5}\n', "'timestamp' is missing"),
        ("absent.csv", None, "No such file"),
    ],
)
def test_traces_that_are_refused(
    run: Run, files: tuple[str, ...], tmp_path: Path, name: str, text: str | None, named: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    for command in (SIMULATE, PLAN):
        assert_refused(run(*command, "--trace", name, *files[2:]), named)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda text: text.replace('"version": 1,', '"version": 2,'), "is of version 2, this kvfold reads version 1"),
        (lambda text: text[: len(text) // 2], "is no profile"),
        (lambda text: "[]", "is no profile"),
        (lambda text: text.replace('"fixed": 0.01', '"fixed": -0.01'), "is damaged (negative costs"),
        (lambda text: text.replace('"fixed": 0.01', '"fixed": "a"'), "is damaged"),
        (lambda text: text.replace('"fixed": 0.01', '"fixed": NaN'), "is no profile"),
        (lambda text: text.replace('"kivi(bits=2)"', '"kivi(bits"'), "is damaged"),
        (lambda text: text.replace('"sealed": {', '"was": {'), "is damaged"),
    ],
)
def test_profiles_that_are_refused(run: Run, files: tuple[str, ...], change: Callable[[str], str], named: str) -> None:
    path = Path("profile.json")
    changed = change(path.read_text())
    assert changed != path.read_text()
    path.write_text(changed)
    assert_refused(run("simulate", *files), named)
    path.unlink()
    assert_refused(run("simulate", *files), "give a file that `kvfold profile --out` wrote")


def test_a_profile_comes_back_as_it_was(tmp_path: Path) -> None:
    own = profile(method_profile("none"), method_profile("kivi(bits=2)"))
    assert own.methods[1].pages(64).held(100, 100) > 0
    save_profile(own, tmp_path / "p.json")
    again = load_profile(tmp_path / "p.json")
    assert again == own
    assert again.of("kivi( bits = 2 )") == own.methods[1]


def assert_refused(result: tuple[int, str, str], named: str) -> None:
    code, out, err = result
    assert (code, out) == (2, ""), err
    lines = [line for line in err.splitlines() if not line.endswith(" ...")]  # progress
    assert len(lines) == 1, err
    assert named in lines[0]
