"""Log-probabilities of given tokens against torch's cross entropy."""

import pytest
import torch

from kvfold.engine.logprobs import token_logprobs

VOCAB = 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logprobs_do_not_depend_on_how_rows_are_divided(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(11, VOCAB, generator=generator).to(dtype)
    tokens = torch.randint(0, VOCAB, (11,), generator=generator)
    whole = token_logprobs(logits, tokens, top=60)
    reference = torch.nn.functional.cross_entropy(logits.float(), tokens, reduction="none")
    torch.testing.assert_close(whole.logprob, -reference)
    assert whole.top_ids.shape == (11, VOCAB)
    monkeypatch.setattr("kvfold.engine.logprobs._CHUNK_ELEMENTS", 3 * VOCAB)
    divided = token_logprobs(logits, tokens, top=60)
    assert torch.equal(divided.logprob, whole.logprob)
    assert torch.equal(divided.rank, whole.rank)
    assert torch.equal(divided.top_logprob, whole.top_logprob)
    assert token_logprobs(logits[:0], tokens[:0], top=2).as_dicts() == []


def test_equally_likely_tokens_share_a_rank() -> None:
    entry = token_logprobs(torch.tensor([[1.0, 2.0, 2.0, 0.0]]), torch.tensor([3]), top=3).as_dicts()[0]
    assert {token_id: logprob.rank for token_id, logprob in entry.items()} == {3: 4, 1: 1, 2: 1, 0: 3}
