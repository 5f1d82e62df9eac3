"""The sampler against numpy and transformers: distributions, filters, penalties, batch independence."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvfold.engine.params import SamplingParams
from kvfold.engine.sampler import RowState, SampledTokens, Sampler

VOCAB = 50
Array = npt.NDArray[np.float64]


def random_logits(rows: int, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def row(prompt: list[int] | None = None, output: list[int] | None = None, **options: Any) -> RowState:
    """A row with default end-of-sequence token 0."""
    params = SamplingParams(max_tokens=None, **options)
    return RowState.create(params, prompt or [], output_token_ids=output, eos_token_ids=[0])


def sample(logits: torch.Tensor, *rows: RowState) -> SampledTokens:
    return Sampler().sample(logits, rows)


def softmax(values: Array) -> Array:
    powers: Array = np.exp(values - values.max())
    shares: Array = powers / powers.sum()
    return shares


def assert_follows(tokens: list[int], probabilities: Array) -> None:
    """Chi-square test: the statistic of k cells stays under its mean by five standard deviations."""
    expected = probabilities * len(tokens)
    counts = np.bincount(tokens, minlength=len(probabilities))
    assert not counts[probabilities == 0].any()
    rare = expected < 5
    observed_cells = np.append(counts[~rare], counts[rare].sum())
    expected_cells = np.append(expected[~rare], expected[rare].sum())
    used = expected_cells > 0
    difference = observed_cells[used] - expected_cells[used]
    degrees = max(1, int(used.sum()) - 1)
    assert float((difference**2 / expected_cells[used]).sum()) < degrees + 5 * np.sqrt(2 * degrees)


def draws(logits: torch.Tensor, count: int, **options: Any) -> list[int]:
    """`count` tokens of one seeded request that sees the same [V] logits in every step."""
    state = row(seed=5, **options)
    tokens = []
    for _ in range(count):
        tokens.append(sample(logits[None], state).token_ids[0])
        state.output_token_ids.append(0)
    return tokens


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = random_logits(1, 20)[0]
    tokens = draws(logits, 4000, temperature=temperature)
    assert_follows(tokens, softmax(logits.double().numpy() / temperature))


def test_completions_and_seeds_draw_independently() -> None:
    logits = random_logits(1, 8)
    probabilities = softmax(logits[0].double().numpy())
    rows = [RowState.create(SamplingParams(seed=seed), [], index=index) for seed in range(50) for index in range(40)]
    assert_follows(sample(logits.expand(len(rows), -1), *rows).token_ids, probabilities)


def test_filters_act_in_order_and_each_on_its_own_rows() -> None:
    logits = random_logits(1, 30)
    options: list[dict[str, Any]] = [
        {},
        {"top_k": 4},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"top_k": 4, "top_p": 0.6},
    ]
    scaled = logits / 0.8
    top4 = TopKLogitsWarper(4)(None, scaled)
    filtered = [scaled, top4, TopPLogitsWarper(0.6)(None, scaled), MinPLogitsWarper(0.2)(None, scaled)]
    filtered += [TopPLogitsWarper(0.6)(None, top4)]
    allowed: list[set[int]] = [set(line[0].isfinite().nonzero()[:, 0].tolist()) for line in filtered]
    seen: list[set[int]] = [set() for _ in options]
    rows = [row(seed=index, temperature=0.8, **option) for index, option in enumerate(options)]
    for _ in range(400):
        for index, token in enumerate(sample(logits.expand(len(rows), -1), *rows).token_ids):
            seen[index].add(token)
            rows[index].output_token_ids.append(token)
    assert all(tokens <= limit for tokens, limit in zip(seen, allowed, strict=True))
    assert seen[1] == allowed[1]
    assert seen[4] == allowed[4]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 5), st.integers(0, 2**31))
def test_a_seeded_row_does_not_depend_on_its_batch(seed: int, at: int, request_seed: int) -> None:
    logits = random_logits(6, seed=seed)
    others = [
        row(temperature=0.0),
        row(top_k=3),
        row(top_p=0.5, seed=1),
        row(prompt=[1, 2], output=[3, 3], repetition_penalty=1.3),
        row(min_p=0.1, logprobs=3, logit_bias={4: 9.0}),
    ]

    def mine() -> RowState:
        return row([5, 6], [7, 8, 7], seed=request_seed, temperature=1.3, top_p=0.9, top_k=40, presence_penalty=0.5)

    alone = sample(logits[at : at + 1], mine()).token_ids[0]
    assert sample(logits, *others[:at], mine(), *others[at:]).token_ids[at] == alone


def test_a_resumed_row_goes_on_with_the_same_draws() -> None:
    logits = random_logits(12)
    whole = row(seed=3, frequency_penalty=0.5)
    for line in logits:
        whole.output_token_ids += sample(line[None], whole).token_ids
    resumed = row(output=whole.output_token_ids[:5], seed=3, frequency_penalty=0.5)
    for line in logits[5:]:
        resumed.output_token_ids += sample(line[None], resumed).token_ids
    assert resumed.output_token_ids == whole.output_token_ids


def test_draws_depend_on_seed_completion_and_position_only() -> None:
    def key(seed: int | None, request_id: str = "a", index: int = 0, engine_seed: int = 0) -> float:
        params = SamplingParams(seed=seed)
        return RowState.create(params, [], request_id=request_id, index=index, engine_seed=engine_seed).uniform()

    assert key(1, "a") == key(1, "b")
    assert key(1, engine_seed=0) == key(1, engine_seed=9)
    assert len({key(1), key(2), key(1, index=1), key(None), key(None, "b"), key(None, engine_seed=1)}) == 6
    values = [row(output=[0] * position, seed=1).uniform() for position in range(2000)]
    assert len(set(values)) == 2000
    assert all(0 <= value < 1 for value in values)


def test_greedy_takes_the_most_likely_and_leaves_the_logits_alone() -> None:
    logits = random_logits(6)
    before = logits.clone()
    rows = [
        row(temperature=0.0),
        row(temperature=1e-7),
        row(top_k=1),
        row(temperature=0.0, logit_bias={1: 1.0}),
    ]
    rows += [row(temperature=0.0, prompt=[1], output=[2], repetition_penalty=1.2), row(top_p=0.5)]
    token_ids = sample(logits, *rows).token_ids
    assert token_ids[:3] == before[:3].argmax(-1).tolist()
    assert torch.equal(logits, before)
    assert sample(logits[:0]).token_ids == []


@settings(max_examples=40, deadline=None)
@given(
    prompt=st.lists(st.integers(0, VOCAB - 1), max_size=20),
    output=st.lists(st.integers(0, VOCAB - 1), max_size=20),
    repetition=st.sampled_from([0.5, 1.0, 1.3, 2.0]),
    presence=st.sampled_from([-1.0, 0.0, 1.5]),
    frequency=st.sampled_from([-1.0, 0.0, 0.7]),
)
def test_penalties_equal_the_naive_loop(
    prompt: list[int], output: list[int], repetition: float, presence: float, frequency: float
) -> None:
    logits = random_logits(2)
    naive = logits[0].double().numpy().copy()
    for token in set(prompt) | set(output):
        naive[token] = naive[token] / repetition if naive[token] > 0 else naive[token] * repetition
    for token in output:
        naive[token] -= frequency
    for token in set(output):
        naive[token] -= presence
    names = {"repetition_penalty": repetition, "presence_penalty": presence, "frequency_penalty": frequency}
    state = row(prompt, [], temperature=0.0, **names)
    for token in output:  # counts are carried from step to step
        sample(logits, state, row())
        state.output_token_ids.append(token)
    assert sample(logits, state, row()).token_ids[0] == int(naive.argmax())


def test_repetition_penalty_equals_that_of_transformers() -> None:
    logits, prompt, output = random_logits(1), [1, 2, 3, 3], [4, 5, 4]
    reference = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + output]), logits.clone())
    order = reference[0].argsort(descending=True).tolist()
    banned: dict[int, float] = {}
    for expected in order[:10]:  # take the winners away one by one: the whole order must agree
        state = row(prompt, output, temperature=0.0, repetition_penalty=1.7, logit_bias=banned)
        assert sample(logits, state).token_ids == [expected]
        banned[expected] = -100.0


def test_logit_bias_and_min_tokens() -> None:
    logits = random_logits(1)
    logits[0, 0], logits[0, 9] = 60.0, 50.0  # 0 is end of sequence
    assert sample(logits, row(temperature=0.0)).token_ids == [0]
    assert sample(logits, row(temperature=0.0, logit_bias={9: 20.0})).token_ids == [9]
    assert sample(logits, row(temperature=0.0, min_tokens=2)).token_ids == [9]
    assert sample(logits, row(output=[1, 1], temperature=0.0, min_tokens=2)).token_ids == [0]
    assert sample(logits, row(seed=1, min_tokens=2, stop_token_ids=[9])).token_ids[0] not in (0, 9)
    assert sample(logits, row(temperature=0.0, min_tokens=2, ignore_eos=True)).token_ids == [0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_concern_their_row_alone(value: float, temperature: float) -> None:
    logits = random_logits(3)
    rows = [row(temperature=temperature, seed=1, logprobs=0) for _ in range(3)]
    good = sample(logits, *rows)
    logits[1] = value
    found = sample(logits, *rows)
    assert "not finite" in (found.errors[1] or "")
    assert found.token_ids[1] is found.logprobs[1] is None
    assert [found.errors[i] for i in (0, 2)] == [None, None]
    assert [found.token_ids[i] for i in (0, 2)] == [good.token_ids[i] for i in (0, 2)]


def test_logprobs_are_of_the_untouched_logits() -> None:
    logits = random_logits(3)
    rows = [row(logprobs=2, temperature=0.5, top_k=2, seed=1, logit_bias={7: 100.0}), row(), row(logprobs=0)]
    result = sample(logits, *rows)
    assert result.logprobs[1] is None
    for index, top in ((0, 2), (2, 0)):
        entry, reference = result.logprobs[index], logits[index].log_softmax(-1)
        assert entry is not None
        token = result.token_ids[index]
        best = reference.topk(top).indices.tolist()
        assert list(entry) == list(dict.fromkeys([token, *best]))
        for token_id, logprob in entry.items():
            assert logprob.logprob == pytest.approx(reference[token_id].item(), abs=1e-5)
            assert logprob.rank == 1 + int((reference > reference[token_id]).sum())
    assert result.token_ids[0] == 7


def test_large_batches_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(9)
    rows = [row(seed=index, temperature=float(index % 3), top_p=0.9) for index in range(9)]
    whole = sample(logits, *rows).token_ids
    monkeypatch.setattr("kvfold.engine.sampler._DRAW_ELEMENTS", 2 * VOCAB)
    assert sample(logits, *rows).token_ids == whole
