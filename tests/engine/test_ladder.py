"""The exactness ladder: dense pages are transformers, a full-width fold is dense, chunks change nothing."""

from collections.abc import Callable

import pytest
import torch

from kvfold import LLM

from .tiny import Tiny, assert_same_but_for_rounding, generated, greedy, prompt_logprobs, run, tokens

GetTiny = Callable[[str], Tiny]
FAMILIES = ["llama", "qwen2", "gemma3", "gpt2"]
PROMPTS = [tokens(length, seed) for seed, length in enumerate((1, 37, 220))]


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_pages_give_the_logprobs_of_transformers(tiny: GetTiny, family: str) -> None:
    model = tiny(family)
    prompts = PROMPTS[1:]
    for prompt, found in zip(prompts, prompt_logprobs(model.engine("none", chunk=48), prompts), strict=True):
        torch.testing.assert_close(found, model.logprobs(prompt), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_pages_give_the_greedy_tokens_of_transformers(tiny: GetTiny, family: str) -> None:
    model = tiny(family)
    for prompt, [new] in zip(PROMPTS, generated(run(model.engine("none"), PROMPTS, greedy(24))), strict=True):
        with torch.no_grad():
            logits = model.reference(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == new  # by induction: each follows from those before it


@pytest.mark.parametrize("map_name", ["optimal", "stacked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_full_width_fold_is_dense(tiny: GetTiny, family: str, map_name: str) -> None:
    model = tiny(family)
    engine = model.engine(f"zeroc(rank=16,map={map_name},recent=32)", "none", chunk=48)
    found, expected = (prompt_logprobs(engine, PROMPTS[1:], lane) for lane in (0, 1))
    assert engine.lanes[0].layout.far_tokens(220) > 150
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_bits_lose_more(tiny: GetTiny, family: str) -> None:
    """What makes the other rungs mean something: codes are read, and each bit helps."""
    model = tiny(family)
    prompt = PROMPTS[2]
    dense = prompt_logprobs(model.engine("none"), [prompt])[0]
    losses = []
    for bits in (1.5, 3, 8):
        found = prompt_logprobs(model.engine(f"zeroc(bits={bits},recent=16)"), [prompt])[0]
        losses.append(float((found - dense).square().mean()))
    assert losses[0] > losses[1] > losses[2] > 0
    assert losses[0] > 1e-3


@pytest.mark.parametrize("method", ["none", "zeroc(bits=4)", "zeroc(bits=3,recent=20)", "zeroc(bits=2,sinks=0)"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_chunks_change_nothing(tiny: GetTiny, family: str, method: str) -> None:
    model = tiny(family)
    prompt = PROMPTS[2]
    whole = prompt_logprobs(model.engine(method, chunk=512), [prompt])[0]
    for chunk in (7, 64):
        found = prompt_logprobs(model.engine(method, chunk=chunk, prefix_block=33), [prompt])[0]
        assert_same_but_for_rounding(found, whole)


@pytest.mark.parametrize("method", ["none", "zeroc(bits=3,recent=20)"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_generating_is_reading_token_by_token(tiny: GetTiny, family: str, method: str) -> None:
    engine = tiny(family).engine(method, prefix_caching=False)
    [output] = run(engine, [tokens(30, 1)], greedy(70, logprobs=0))
    new = output.outputs[0]
    [read] = prompt_logprobs(engine, [output.prompt_token_ids + new.token_ids])
    written = [entry[token].logprob for token, entry in zip(new.token_ids, new.logprobs or [], strict=True)]
    assert_same_but_for_rounding(torch.tensor(written), read[-70:])


QUESTIONS = [
    "The capital of France is",
    "Water boils at",
    "def fibonacci(n):",
    "Once upon a time there was a king who",
    "The three laws of motion say that",
    "1, 2, 4, 8, 16,",
    "Dear Sir or Madam,",
    "A short history of the printing press:",
]


@pytest.mark.slow
def test_smollm2_gives_the_greedy_tokens_of_transformers() -> None:
    from transformers import AutoModelForCausalLM

    llm = LLM("smollm2-135m", dtype="float32", kv_memory="256MiB")
    reference = AutoModelForCausalLM.from_pretrained(llm.model.path, dtype=torch.float32)
    for output in llm.generate(QUESTIONS, greedy(64)):
        prompt, new = output.prompt_token_ids, output.outputs[0].token_ids
        assert len(new) == 64
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == new
