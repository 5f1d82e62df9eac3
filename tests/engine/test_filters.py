"""Top-k, top-p and min-p against their definitions in numpy and against transformers."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from kvfold.engine.filters import draw, keep_min_p, keep_top_k, keep_top_p

VOCAB = 50
Array = npt.NDArray[np.float64]


def random_logits(rows: int, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def softmax(values: Array) -> Array:
    powers: Array = np.exp(values - values.max())
    shares: Array = powers / powers.sum()
    return shares


def kept(logits: torch.Tensor) -> list[set[int]]:
    return [set(line.isfinite().nonzero()[:, 0].tolist()) for line in logits]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60))
def test_top_k_keeps_the_k_largest(seed: int, k: int) -> None:
    logits = random_logits(3, seed=seed)
    naive = [set(np.argsort(-line.numpy(), kind="stable")[:k].tolist()) for line in logits]
    assert kept(keep_top_k(logits, torch.tensor([k] * 3))) == naive


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(2, 5))
def test_top_k_with_ties_keeps_exactly_k(seed: int, k: int, levels: int) -> None:
    logits = torch.randint(0, levels, (4, 20), generator=torch.Generator().manual_seed(seed)).float()
    naive = [set(np.argsort(-line.numpy(), kind="stable")[:k].tolist()) for line in logits]
    assert kept(keep_top_k(logits, torch.tensor([k] * 4))) == naive


def naive_top_p(line: Array, top_p: float) -> set[int]:
    probabilities, total, chosen = softmax(line), 0.0, set()
    for token in np.argsort(-line, kind="stable"):
        chosen.add(int(token))
        total += probabilities[token]
        if total >= top_p:
            break
    return chosen


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 0.999))
def test_top_p_keeps_the_smallest_sufficient_set(seed: int, top_p: float) -> None:
    logits = random_logits(3, seed=seed)
    result = keep_top_p(logits, torch.tensor([top_p] * 3, dtype=torch.float64))
    assert kept(result) == [naive_top_p(line.double().numpy(), top_p) for line in logits]


def test_top_p_is_right_beyond_the_sorted_head() -> None:
    logits = torch.cat([random_logits(1, 5000) / 30, random_logits(1, 5000) * 3])  # one flat row, one peaked
    top_p = torch.tensor([0.9, 0.9], dtype=torch.float64)
    both = kept(keep_top_p(logits, top_p))
    assert both == [naive_top_p(line.double().numpy(), 0.9) for line in logits]
    assert len(both[0]) > 2000
    assert kept(keep_top_p(logits[1:], top_p[1:])) == both[1:]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.001, 0.9))
def test_min_p_keeps_what_is_likely_enough(seed: int, min_p: float) -> None:
    logits = random_logits(3, seed=seed)
    naive = []
    for line in logits:
        probabilities = softmax(line.double().numpy())
        naive.append(set(np.nonzero(probabilities >= min_p * probabilities.max())[0].tolist()))
    assert kept(keep_min_p(logits, torch.tensor([min_p] * 3, dtype=torch.float64))) == naive


@pytest.mark.parametrize("seed", range(5))
def test_filters_equal_those_of_transformers(seed: int) -> None:
    logits = random_logits(4, 1000, seed)

    def reference(processor: Any) -> torch.Tensor:
        result: torch.Tensor = processor(torch.zeros(4, 1, dtype=torch.int64), logits)
        return result

    for k in (1, 7, 999, 2000):
        assert torch.equal(keep_top_k(logits, torch.tensor([k] * 4)), reference(TopKLogitsWarper(k)))
    for p in (0.05, 0.5, 0.95):
        shares = torch.tensor([p] * 4, dtype=torch.float64)
        assert torch.equal(keep_top_p(logits, shares), reference(TopPLogitsWarper(p)))
        assert torch.equal(keep_min_p(logits, shares), reference(MinPLogitsWarper(p)))


def test_a_draw_never_takes_an_impossible_token() -> None:
    logits = torch.full((4, 9), -torch.inf)
    logits[:, 3], logits[:, 5] = 0.0, 1.0
    uniforms = torch.tensor([0.0, 0.2, 0.9, 1 - 2.0**-52], dtype=torch.float64)
    assert draw(logits, uniforms).tolist() == [3, 3, 5, 5]
