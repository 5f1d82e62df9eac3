"""Against a server that misbehaves: the figures are what the server recorded."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from kvfold.benchmark.errors import BenchmarkError
from kvfold.benchmark.lengths import LengthRange
from kvfold.benchmark.options import Limits, TargetOptions, WorkloadOptions
from kvfold.benchmark.report import Report
from kvfold.benchmark.session import benchmark

from .fake import BROKEN, DROP, ERROR_EVENT, GARBAGE, HANG, MODEL, NO_STREAM, OK, TOO_MANY, Fake, serving

KINDS = {
    TOO_MANY: "429",
    BROKEN: "5xx",
    DROP: "connection",
    ERROR_EVENT: "stream error",
    GARBAGE: "protocol",
    NO_STREAM: "protocol",
}
SMALL = WorkloadOptions(requests=8, input_tokens=LengthRange(20, 60), output_tokens=LengthRange(4, 9), concurrency=3)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def measure(fake: Fake, workload: WorkloadOptions = SMALL, limits: Limits | None = None, **target: Any) -> Report:
    return benchmark(TargetOptions(fake.url, **target), workload, limits or Limits())


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_lengths_are_exact_on_both_routes(stack: ExitStack, endpoint: Any) -> None:
    fake = stack.enter_context(serving(Fake()))
    report = measure(fake, endpoint=endpoint)
    (run,) = report.runs
    assert Counter((o.wanted_input, o.wanted_output) for o in run.outcomes) == Counter(
        (asked.prompt_tokens, asked.tokens) for asked in fake.asked
    )
    for outcome in run.outcomes:
        assert 20 <= outcome.wanted_input <= 60
        assert outcome.wanted_input == outcome.prompt_tokens
        assert outcome.wanted_output == outcome.output_tokens == len(outcome.arrivals)
    for asked in fake.asked:
        assert asked.body["ignore_eos"] is True
        assert asked.body["min_tokens"] == asked.body["max_tokens"] == asked.tokens
    assert run.summary.truncated == 0
    assert report.notes == []


def test_every_failure_is_counted_by_its_kind(stack: ExitStack) -> None:
    kinds = [OK, TOO_MANY, OK, BROKEN, DROP, ERROR_EVENT, OK, GARBAGE, NO_STREAM, OK, DROP]
    fake = stack.enter_context(serving(Fake(behaviour=lambda n: kinds[n])))
    workload = WorkloadOptions(requests=len(kinds), input_tokens=LengthRange(9, 9), output_tokens=LengthRange(4, 9))
    report = measure(fake, workload, Limits(ttft=600.0))
    summary = report.runs[0].summary
    assert len(fake.asked) == len(kinds) == summary.requests
    assert summary.errors == Counter(KINDS[a.behaviour] for a in fake.asked if a.behaviour != OK)
    sent_well = [asked for asked in fake.asked if asked.behaviour == OK]
    assert summary.completed == len(sent_well)
    assert summary.output_tokens == sum(asked.tokens for asked in sent_well)
    assert summary.prompt_tokens == sum(asked.prompt_tokens for asked in sent_well)
    assert summary.cached_tokens == 3 * len(sent_well)
    assert summary.goodput == pytest.approx(summary.request_throughput)
    assert summary.ttft is not None
    assert summary.ttft.count == len(sent_well)
    assert all(o.arrivals for o in report.runs[0].outcomes if o.error == "stream error")


def test_answers_that_never_end_are_given_up(stack: ExitStack) -> None:
    fake = stack.enter_context(serving(Fake(behaviour=lambda _: HANG)))
    summary = measure(fake, timeout=0.2).runs[0].summary
    assert summary.errors == {"timeout": 8}
    assert (summary.completed, summary.ttft, summary.output_tokens) == (0, None, 0)


def test_methods_get_the_same_workload_one_after_the_other(stack: ExitStack) -> None:
    fake = stack.enter_context(serving(Fake()))
    workload = WorkloadOptions(**{**SMALL.__dict__, "warmup": 2})
    report = measure(fake, workload, kv=("none", "zeroc(bits=4)"))
    methods = [asked.body["kv"] for asked in fake.asked]
    assert methods == ["none"] * 10 + ["zeroc(bits=4)"] * 10
    assert Counter(a.prompt for a in fake.asked[:10]) == Counter(a.prompt for a in fake.asked[10:])
    for run, factor in zip(report.runs, (1, 4), strict=True):
        asked = [a for a in fake.asked if a.body["kv"] == run.kv and a.prompt not in _warm(fake, run)]
        assert run.summary.kv is not None
        assert run.summary.kv.compression == pytest.approx(factor, rel=0.01)
        assert run.summary.kv.dense_bytes == pytest.approx(
            sum(100 * (a.prompt_tokens + a.tokens) for a in asked) / len(asked)
        )
    assert fake.peak <= 3


def _warm(fake: Fake, run: Any) -> set[str]:
    """The first two requests of a method warm it up."""
    return {asked.prompt for asked in [a for a in fake.asked if a.body["kv"] == run.kv][:2]}


@pytest.mark.parametrize(
    "refused",
    [
        {"ignore_eos"},
        {"min_tokens", "max_tokens", "temperature"},
        {"ignore_eos", "stream_options", "max_completion_tokens"},
    ],
)
def test_servers_that_take_fewer_fields_are_measured_too(stack: ExitStack, refused: set[str]) -> None:
    fake = stack.enter_context(serving(Fake(refused=frozenset(refused), stop_after=5)))
    report = measure(fake)
    summary = report.runs[0].summary
    assert summary.completed == 8
    assert not any(refused & set(asked.body) for asked in fake.asked)
    assert summary.output_tokens == sum(asked.tokens for asked in fake.asked)
    # Each was asked for 4 to 9 tokens, and the server stopped after 5.
    lengths = [int(a.body.get("max_tokens", a.body.get("max_completion_tokens", 0))) for a in fake.asked]
    assert summary.truncated == sum(length > 5 for length in lengths)
    assert summary.counted is ("stream_options" not in refused)
    assert any("ignore_eos" in note for note in report.notes)


def test_without_a_tokenizer_lengths_come_near(stack: ExitStack) -> None:
    fake = stack.enter_context(serving(Fake(tokenizer=False)))
    report = measure(fake, WorkloadOptions(requests=4, input_tokens=LengthRange(400, 400)))
    assert all(asked.prompt_tokens == pytest.approx(400, rel=0.35) for asked in fake.asked)
    assert report.runs[0].summary.prompt_tokens == sum(asked.prompt_tokens for asked in fake.asked)
    assert any("estimated" in note for note in report.notes)


def test_requests_are_cut_to_the_context(stack: ExitStack) -> None:
    fake = stack.enter_context(serving(Fake(context=100)))
    report = measure(fake, WorkloadOptions(requests=3, output_tokens=LengthRange(10, 10)))
    assert [asked.prompt_tokens for asked in fake.asked] == [90, 90, 90]
    assert any("3 requests were cut to the context of 100" in note for note in report.notes)


def test_a_server_without_a_list_needs_a_name(stack: ExitStack) -> None:
    fake = stack.enter_context(serving(Fake(models=False, tokenizer=False, usage=False)))
    with pytest.raises(BenchmarkError, match="--model"):
        measure(fake)
    summary = measure(fake, model="any").runs[0].summary
    assert summary.completed == 8
    assert summary.output_tokens == sum(asked.tokens for asked in fake.asked)


def test_a_key_is_sent_and_missed(stack: ExitStack) -> None:
    fake = stack.enter_context(serving(Fake(key="secret")))
    with pytest.raises(BenchmarkError, match="--api-key"):
        measure(fake)
    report = measure(fake, api_key="secret")
    assert report.runs[0].summary.completed == 8
    assert "secret" not in str(report.settings)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"model": "fake-mode"}, f"did you mean '{MODEL}'"),
        ({"model": "zzz"}, f"it serves {MODEL}"),
        ({"kv": ("none", "zip")}, "--kv 'zip' .400: unknown method zip"),
    ],
)
def test_what_the_server_lacks_is_known_before_any_load(stack: ExitStack, target: Any, message: str) -> None:
    fake = stack.enter_context(serving(Fake()))
    with pytest.raises(BenchmarkError, match=message):
        measure(fake, **target)
    assert fake.asked == []


def test_no_server_is_one_sentence() -> None:
    with serving(Fake()) as fake:
        pass
    with pytest.raises(BenchmarkError, match="no server answers at http"):
        measure(fake)
