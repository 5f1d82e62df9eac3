"""Divergence and likelihood against torch's own, however the logits come in."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, kl_div

from kvfold.evaluation.likelihood import AnswerTap

VOCAB, ANSWER, START = 11, 6, 3


def logits(seed: int) -> torch.Tensor:
    return torch.randn(ANSWER, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def tapped(values: torch.Tensor, cuts: list[int], reference: torch.Tensor | None = None) -> AnswerTap:
    """Receives the values in pieces, the last one with a row that predicts what follows the answer."""
    tap = AnswerTap(list(range(ANSWER)), START, reference)
    edges = [0, *sorted(cuts), ANSWER]
    for begin, end in pairwise(edges):
        rows = values[begin:end]
        tap.receive(START + begin, rows if end < ANSWER else torch.cat([rows, values[:1]]))
    return tap


@given(st.integers(0, 99), st.lists(st.integers(1, ANSWER - 1), unique=True))
def test_figures_are_torchs_and_cuts_do_not_matter(seed: int, cuts: list[int]) -> None:
    dense, other = logits(seed), logits(seed + 100)
    reference = tapped(dense, []).logprobs
    assert reference is not None
    found = tapped(other, cuts, reference).result()
    answer = torch.arange(ANSWER)
    torch.testing.assert_close(found.nll, cross_entropy(other, answer, reduction="none"))
    expected = kl_div(other.log_softmax(-1), dense.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(found.kl, expected)
    assert found.agree.tolist() == (dense.argmax(-1) == other.argmax(-1)).tolist()
    assert found.right.tolist() == (other.argmax(-1) == answer).tolist()
    assert found.said == other.argmax(-1).tolist()


def test_the_dense_cache_does_not_diverge_from_itself() -> None:
    first = tapped(logits(0), [])
    assert first.result().kl.tolist() == [0.0] * ANSWER
    again = tapped(logits(0), [2], first.logprobs).result()
    assert again.kl.tolist() == [0.0] * ANSWER
    assert bool(again.agree.all())


def test_positions_that_come_twice_count_once() -> None:
    tap = tapped(logits(0), [3])
    expected = tap.result().nll.clone()
    tap.receive(START + 2, logits(0)[2:4])
    assert torch.equal(tap.result().nll, expected)


def test_a_position_that_never_came_is_a_defect() -> None:
    tap = AnswerTap(list(range(ANSWER)), START)
    tap.receive(START, logits(0)[:3])
    with pytest.raises(RuntimeError):
        tap.result()
