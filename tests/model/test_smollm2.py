"""The embedded default model, from its wheel through the user's own cache."""

from typing import Any

import pytest
import torch
import transformers

from kvfold.model.loading import load_model


@pytest.mark.slow
def test_smollm2_gives_the_logits_of_transformers(run: Any) -> None:
    loaded = load_model("smollm2-135m", dtype=torch.float32)
    assert loaded.spec.eos_token_ids == (loaded.tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    reference = transformers.AutoModelForCausalLM.from_pretrained(loaded.path, dtype=torch.float32)
    ids = torch.tensor(loaded.tokenizer("The capital of France is")["input_ids"])
    with torch.no_grad():
        logits, expected = run(loaded.decoder, ids), reference(ids[None]).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    assert loaded.tokenizer.decode(logits[-1].argmax()) == " Paris"
