"""Lengths: parsing, scaling, and the model's context."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.benchmark.lengths import fit_context, parse_lengths, scaled
from kvfold.errors import ConfigError


@given(st.integers(1, 10**6), st.integers(0, 1000), st.integers(0, 2**32))
def test_drawn_lengths_are_in_the_range(low: int, width: int, seed: int) -> None:
    lengths = parse_lengths(f"{low}:{low + width}", "--input-tokens")
    assert low <= lengths.draw(Random(seed)) <= low + width
    assert parse_lengths(str(low), "--input-tokens").draw(Random(seed)) == low


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "5:4", "0:4", "1:", ":4", "1:2:3", "1.5"])
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--output-tokens"):
        parse_lengths(text, "--output-tokens")


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(2, 10**6))
def test_what_fits_is_unchanged_and_what_does_not_fills_the_context(prompt: int, output: int, context: int) -> None:
    fitted = fit_context(prompt, output, context)
    if prompt + output <= context:
        assert fitted == (prompt, output)
    else:
        assert sum(fitted) == context
        assert min(fitted) >= 1
        assert fitted[1] in (output, context - 1)


def test_a_context_without_room_is_refused() -> None:
    assert fit_context(5, 5, None) == (5, 5)
    with pytest.raises(ConfigError, match="no room"):
        fit_context(5, 5, 1)


@given(st.integers(1, 10**6), st.floats(1e-6, 1))
def test_scaling_never_loses_a_request_and_keeps_blocks_together(tokens: int, scale: float) -> None:
    assert 1 <= scaled(tokens, scale) <= tokens
    blocks = -(-tokens // 512)
    assert scaled(tokens, scale) <= blocks * scaled(512, scale)
