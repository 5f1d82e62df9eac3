"""`LLM` given things that are no prompts, messages or options: a typed error each time, and it serves on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvfold import LLM, SamplingParams
from kvfold.errors import ConfigError, KvfoldError, ModelError, PromptError

GREEDY = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
MESSAGE = {"role": "user", "content": "A page"}


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> LLM:
    return LLM(tiny_llama, dtype="float32", kv_memory="1MiB")


def token_ids(llm: LLM, prompts: Any) -> list[list[int]]:
    outputs = llm.generate(prompts, GREEDY)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        5,
        b"abc",
        [None],
        [1.5],
        ["a", 5],
        [b"abc"],
        [[1], 2],
        [[1, "x"]],
        [[1.5, 2]],
        [[True]],
        [[1], []],
        {},
        {"prompt": None},
        {"prompt_token_ids": "abc"},
        {"prompt": [5, 6]},
        {"context": "A page"},
        {"context": "", "prompt": "A page"},
        {"context": "A page", "prompt_token_ids": [5]},
        {"prompt_token_ids": [5, 6], "context_tokens": 3},
        {"prompt_token_ids": [5, 6], "context_tokens": 0},
        {"prompt": "A page", "context_tokens": 1},
        {"text": "A page"},
        [{"prompt_token_ids": 5}],
        "a page \udcff",
        torch.tensor([1.5]),
        torch.tensor(3),
    ],
)
def test_what_is_no_prompt_is_refused(llm: LLM, prompt: Any) -> None:
    before = token_ids(llm, "A page")
    with pytest.raises(PromptError):
        llm.generate(prompt, GREEDY)
    assert not llm.engine.has_unfinished
    assert token_ids(llm, "A page") == before


def test_token_ids_may_come_in_any_sequence(llm: LLM) -> None:
    expected = token_ids(llm, [5, 6, 7])
    same: list[Any] = [
        (5, 6, 7),
        range(5, 8),
        np.array([5, 6, 7]),
        torch.tensor([5, 6, 7]),
        list(np.array([5, 6, 7])),
        {"prompt_token_ids": torch.tensor([5, 6, 7])},
    ]
    for prompt in same:
        assert token_ids(llm, prompt) == expected
        assert token_ids(llm, [prompt, prompt]) == expected * 2
    assert token_ids(llm, torch.tensor([[5, 6, 7], [5, 6, 7]])) == expected * 2


def test_a_text_may_come_in_a_mapping(llm: LLM) -> None:
    assert token_ids(llm, {"prompt": "A page"}) == token_ids(llm, "A page")
    assert llm.generate({"prompt": "A page"}, GREEDY)[0].prompt == "A page"


@pytest.mark.parametrize("params", [5, "x", {"n": 2}, [{"n": 2}], GREEDY.temperature + 1])
def test_params_of_another_type_are_refused(llm: LLM, params: Any) -> None:
    with pytest.raises(ConfigError, match="SamplingParams"):
        llm.generate("A page", params)


@pytest.mark.parametrize(
    "messages",
    [5, "hi", ["hi"], MESSAGE, [{}], [{"content": "x"}], [MESSAGE, "y"], [[MESSAGE], []], [None]],
)
def test_what_is_no_conversation_is_refused(llm: LLM, messages: Any) -> None:
    with pytest.raises(PromptError):
        llm.chat(messages, GREEDY)


def test_messages_in_no_encoding_are_refused(llm: LLM) -> None:
    with pytest.raises(PromptError, match="UTF-8"):
        llm.chat([{"role": "user", "content": "\ud800"}], GREEDY)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"threads": "2"}, ConfigError),
        ({"threads": 1.5}, ConfigError),
        ({"seed": None}, ConfigError),
        ({"seed": "x"}, ConfigError),
        ({"chunk": None}, ConfigError),
        ({"chunk": 1.5}, ConfigError),
        ({"max_batch_tokens": "x"}, ConfigError),
        ({"kv": None}, ConfigError),
        ({"kv": 5}, ConfigError),
        ({"model": None}, ModelError),
    ],
)
def test_options_of_another_type_are_refused(
    tiny_llama: Path, options: dict[str, Any], error: type[KvfoldError]
) -> None:
    with pytest.raises(error):
        LLM(**{"model": tiny_llama, **options})


def test_a_top_k_beyond_64_bits_is_refused() -> None:
    with pytest.raises(ConfigError, match="top_k"):
        SamplingParams(top_k=2**63)


def test_contexts_are_compressed_before_the_question(tiny_llama: Path, llm: LLM) -> None:
    staged = LLM(tiny_llama, dtype="float32", kv_memory="8MiB", kv='snapkv(budget=48,compress="context")')
    context, question = "Two requests share pages. " * 60, "Which page?"
    [output] = staged.generate({"context": context, "prompt": question}, GREEDY)
    assert output.prompt == context + question
    assert output.kv.compression > 2  # of 32-bit rows, against 16
    ids = output.prompt_token_ids
    before = len(staged.model.tokenizer(context)["input_ids"])
    [same] = staged.generate({"prompt_token_ids": ids, "context_tokens": before}, GREEDY)
    assert same.outputs[0].token_ids == output.outputs[0].token_ids
    assert same.metrics.cached_prompt_tokens == before
    with pytest.raises(PromptError, match="marks none"):
        staged.generate(context + question, GREEDY)
    with pytest.raises(PromptError, match="message of its own"):
        staged.chat([MESSAGE], GREEDY)
    [answer] = staged.chat([{"role": "system", "content": context}, MESSAGE], GREEDY)
    assert answer.kv.compression > 2
    # Where nothing is compressed at a mark, it changes nothing.
    assert token_ids(llm, {"context": context, "prompt": question}) == token_ids(llm, [ids])


@pytest.mark.parametrize("kv", ["none", "kivi(bits=4)", "snapkv(budget=48)"])
def test_bfloat16_runs(tiny_llama: Path, kv: str) -> None:
    """Attention computes in float32 whatever the activations are; prompts of two lengths make it write row by row."""
    half = LLM(tiny_llama, dtype="bfloat16", kv_memory="8MiB", kv=kv)
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    outputs = half.generate([list(range(5, 69)), list(range(5, 205))], params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [4, 4]
