"""From options to requests: lengths, times, the context, the template's tokens."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from kvfold.benchmark.corpus import Corpus, load_corpus
from kvfold.benchmark.lengths import LengthRange
from kvfold.benchmark.options import Limits, TargetOptions, WorkloadOptions
from kvfold.benchmark.prompts import PromptBuilder
from kvfold.benchmark.workload import Workload, build_workload, load_sizes
from kvfold.errors import ConfigError

from .test_prompts import FakeCounter
from .texts import shared_tokens, tokens

CORPUS = load_corpus(None)


def build(options: WorkloadOptions, corpus: Corpus = CORPUS, **known: Any) -> Workload:
    builder = PromptBuilder(corpus, FakeCounter(), options.seed)
    return asyncio.run(build_workload(options, load_sizes(options, corpus), builder, **known))


@pytest.fixture
def mooncake(tmp_path: Path) -> Path:
    """Three requests; the first two share two blocks of 512 tokens."""
    rows = [(0, 1300, 40, [0, 1, 2]), (500, 1536, 9, [0, 1, 3]), (1500, 600, 10, [4, 5])]
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    path = tmp_path / "mooncake.jsonl"
    path.write_text("\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows))
    return path


def test_a_scaled_trace_keeps_its_shape(mooncake: Path) -> None:
    workload = build(WorkloadOptions(trace=mooncake, scale=0.25, speed=2.0))
    assert [r.at for r in workload.requests] == [0, 0.25, 0.75]
    assert [r.input_tokens for r in workload.requests] == [325, 384, 150]
    assert [tokens(r.prompt) for r in workload.requests] == [325, 384, 150]
    assert [r.output_tokens for r in workload.requests] == [10, 3, 3]
    first, second, third = (r.prompt for r in workload.requests)
    assert 256 <= shared_tokens(first, second) < 300
    assert shared_tokens(first, third) < 20


def test_a_part_of_a_trace_with_other_arrivals(mooncake: Path) -> None:
    workload = build(WorkloadOptions(trace=mooncake, scale=0.1, first=1, requests=2, rate=float("inf")))
    assert [(r.at, r.input_tokens) for r in workload.requests] == [(0, 154), (0, 60)]


def test_the_template_and_the_context_count(mooncake: Path) -> None:
    workload = build(WorkloadOptions(trace=mooncake), overhead=20, context=1000)
    assert [r.input_tokens + r.output_tokens for r in workload.requests] == [1000, 1000, 610]
    assert [tokens(r.prompt) + 20 for r in workload.requests] == [960, 991, 600]
    assert workload.capped == 2


def test_drawn_lengths_and_their_seed() -> None:
    options = WorkloadOptions(
        requests=30, input_tokens=LengthRange(20, 40), output_tokens=LengthRange(1, 9), rate=5.0, shared_prefix=10
    )
    workload = build(options)
    assert all(20 <= r.input_tokens <= 40 and 1 <= r.output_tokens <= 9 for r in workload.requests)
    assert len({r.input_tokens for r in workload.requests}) > 5
    assert shared_tokens(*(r.prompt for r in workload.requests)) >= 10
    assert build(options) == workload
    assert build(WorkloadOptions(**{**options.__dict__, "seed": 1})) != workload


def test_warming_up_uses_other_prompts_of_the_same_lengths() -> None:
    workload = build(WorkloadOptions(requests=3, warmup=4, input_tokens=LengthRange(50, 99)))
    lengths = [r.input_tokens for r in workload.requests]
    assert [r.input_tokens for r in workload.warmup] == [*lengths, lengths[0]]
    assert not {r.prompt for r in workload.warmup} & {r.prompt for r in workload.requests}
    assert len({r.prompt for r in workload.warmup}) == 4


def test_prompts_of_a_data_set_are_sent_as_they_are() -> None:
    corpus = Corpus("questions", ("one", "two", "three"), ("one two", "three"))
    workload = build(WorkloadOptions(requests=3), corpus)
    assert [r.prompt for r in workload.requests] == ["one two", "three", "one two"]
    assert [r.input_tokens for r in workload.requests] == [2, 2, 2]
    wanted = build(WorkloadOptions(requests=3, input_tokens=LengthRange(7, 7)), corpus)
    assert [tokens(r.prompt) for r in wanted.requests] == [7, 7, 7]


@pytest.mark.parametrize(
    ("options", "closed"),
    [
        ({}, False),
        ({"concurrency": 4}, True),
        ({"concurrency": 4, "rate": float("inf")}, True),
        ({"concurrency": 4, "rate": 2.0}, False),
        ({"concurrency": 4, "trace": Path("t")}, False),
        ({"concurrency": 4, "trace": Path("t"), "rate": float("inf")}, True),
    ],
)
def test_which_loads_are_closed_loops(options: dict[str, Any], closed: bool) -> None:
    assert WorkloadOptions(**options).closed_loop is closed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"requests": 0}, "--requests"),
        ({"concurrency": 0}, "--concurrency"),
        ({"warmup": -1}, "--warmup"),
        ({"burstiness": 0.5}, "--burstiness"),
        ({"speed": 2.0}, "--speed applies to a trace"),
        ({"scale": 0.5}, "--scale applies to a trace"),
        ({"first": 3}, "--from applies to a trace"),
        ({"trace": Path("t"), "scale": 0.0}, "--scale 0"),
        ({"trace": Path("t"), "speed": float("nan")}, "--speed nan"),
        ({"trace": Path("t"), "first": -1}, "--from -1"),
        ({"trace": Path("t"), "input_tokens": LengthRange(1, 1)}, "its own lengths"),
        ({"trace": Path("t"), "rate": 1.0, "speed": 2.0}, "one of the two"),
        ({"shared_prefix": 20, "input_tokens": LengthRange(20, 30)}, "--shared-prefix 20"),
        ({"shared_prefix": 512}, "--shared-prefix 512"),
    ],
)
def test_impossible_workloads_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WorkloadOptions(**options)


def test_impossible_targets_and_limits_are_refused() -> None:
    with pytest.raises(ConfigError, match="--kv"):
        TargetOptions("http://h", kv=("none", "none"))
    with pytest.raises(ConfigError, match="--timeout"):
        TargetOptions("http://h", timeout=0)
    with pytest.raises(ConfigError, match="API key"):
        TargetOptions("http://h", api_key="a\nb")
    with pytest.raises(ConfigError, match="--tpot-limit"):
        Limits(tpot=-1.0)
