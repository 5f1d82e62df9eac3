"""Sampling parameters: vLLM's defaults, and every bad value refused in one sentence."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.engine.outputs import KVUsage, RequestMetrics
from kvfold.engine.params import SamplingParams
from kvfold.errors import ConfigError


def test_defaults_are_those_of_vllm() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.logprobs, params.seed) == (16, 0, None, None)
    assert params.stop_strings == ()
    assert params.stop_ids == frozenset()
    assert params.skip_special_tokens
    assert not params.greedy


NUMBERS = ["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"]
INTEGERS = ["n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs"]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "1", None, -3.0, 10**400])
def test_bad_numbers_are_refused(name: str, value: object) -> None:
    arguments: dict[str, Any] = {name: value}
    with pytest.raises(ConfigError, match=rf"^{name}=.* is not allowed: give a number .*\.$"):
        SamplingParams(**arguments)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [True, 1.0, "1", math.nan, -(2**70)])
def test_bad_integers_are_refused(name: str, value: object) -> None:
    arguments: dict[str, Any] = {name: value}
    with pytest.raises(ConfigError, match=rf"^{name}=.* is not allowed: give an integer .*\.$"):
        SamplingParams(**arguments)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"n": 0}, "n"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"min_p": 1.01}, "min_p"),
        ({"top_k": -2}, "top_k"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 4, "min_tokens": 5}, "min_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ["a", 1]}, "stop"),
        ({"stop": 3}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [True]}, "stop_token_ids"),
        ({"stop_token_ids": 3}, "stop_token_ids"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"1": 1.0}}, "logit_bias"),
        ({"logit_bias": {1: math.nan}}, "logit_bias"),
        ({"logit_bias": {1: 101.0}}, "logit_bias"),
        ({"ignore_eos": 1}, "ignore_eos"),
    ],
)
def test_out_of_range_is_refused_by_name(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{named}=.* is not allowed: give .*\.$"):
        SamplingParams(**arguments)


def test_values_are_normalised() -> None:
    params = SamplingParams(
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        top_k=-1,
        stop="end",
        stop_token_ids=[7, 3, 7],
        logit_bias={np.int64(2): 1},  # type: ignore[dict-item]
    )
    assert type(params.temperature) is float
    assert params.top_k == 0
    assert params.stop_strings == ("end",)
    assert params.stop_token_ids == (3, 7)
    assert params.logit_bias == {2: 1.0}
    assert SamplingParams(stop=["a", "b", "a"]).stop_strings == ("a", "b")


def test_token_ids_are_checked_against_the_vocabulary() -> None:
    SamplingParams(stop_token_ids=[9], logit_bias={9: 1.0}).check_vocabulary(10)
    with pytest.raises(ConfigError, match=r"stop_token_ids=10 .* vocabulary size"):
        SamplingParams(stop_token_ids=[10]).check_vocabulary(10)
    with pytest.raises(ConfigError, match=r"logit_bias=10 .* vocabulary size"):
        SamplingParams(logit_bias={10: 1.0}).check_vocabulary(10)


@given(st.floats(min_value=0, max_value=100), st.integers(-1, 10**6), st.floats(0, 1, exclude_min=True, width=32))
def test_everything_in_range_is_accepted(temperature: float, top_k: int, top_p: float) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    assert params.greedy == (temperature < 1e-5 or top_k == 1)
    assert params.top_k == max(top_k, 0)


def test_kv_usage_is_finite_when_nothing_is_held() -> None:
    assert KVUsage().compression == 1.0
    assert KVUsage().bits_per_element == 0.0
    usage = KVUsage(bytes=256, dense_bytes=1024, tokens=2, elements=512)
    assert usage.compression == 4.0
    assert usage.bits_per_element == 4.0


def test_metrics_are_unknown_until_they_happen() -> None:
    metrics = RequestMetrics(arrival_time=10.0)
    assert metrics.ttft is None
    assert metrics.latency is None
    metrics.first_token_time, metrics.finished_time = 10.5, 12.0
    assert [metrics.ttft, metrics.latency] == [0.5, 2.0]
