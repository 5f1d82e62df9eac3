"""Packed weights in the engine, and decoding steps as one call: the same numbers as layer by layer from Python."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvfold import LLM
from kvfold.engine.decoding import KEPT, DecodeProgram, DecodePrograms
from kvfold.errors import ConfigError

from .tiny import Tiny, generated, greedy, prompt_logprobs, run, tokens

GetTiny = Callable[[str], Tiny]
PROMPTS = [tokens(length, seed) for seed, length in enumerate((1, 37, 160, 90, 20))]
LANES = [0, 1, 0, 1, 2]
METHODS = ("none", "zeroc(bits=5,recent=32)", "int4(recent=32)")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per step that ran as a program: its tokens."""
    seen: list[int] = []
    whole = DecodeProgram.run

    def counted(self: DecodeProgram, token_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(len(token_ids))
        return whole(self, token_ids, *rest)

    monkeypatch.setattr(DecodeProgram, "run", counted)
    return seen


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_program_computes_what_the_layers_compute(
    tiny: GetTiny, family: str, bits: int, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests of three methods, of different lengths, that end one after the other, one of them in two completions."""
    params = [greedy(12 + 9 * index, logprobs=0, n=2 if index == 2 else 1) for index in range(len(PROMPTS))]
    found = run(tiny(family).packed_engine(bits, *METHODS), PROMPTS, params, lanes=LANES)
    assert len(calls) >= 40
    monkeypatch.setattr(DecodePrograms, "run", lambda *_: None)
    expected = run(tiny(family).packed_engine(bits, *METHODS), PROMPTS, params, lanes=LANES)
    assert generated(found) == generated(expected)
    assert [o.outputs[0].cumulative_logprob for o in found] == [o.outputs[0].cumulative_logprob for o in expected]


def test_preempted_sequences_go_on_as_programs(tiny: GetTiny, calls: list[int]) -> None:
    model, prompts = tiny("llama"), [tokens(60, seed) for seed in range(6)]
    roomy = run(model.packed_engine(16, "none"), prompts, greedy(40))
    tight = model.packed_engine(16, "none", kv_memory=2**18)
    assert generated(run(tight, prompts, greedy(40))) == generated(roomy)
    tight.check_integrity()
    assert calls


@pytest.mark.parametrize("method", ["snapkv(budget=64)", "hack(bits=4)"])
def test_what_only_torch_attends_runs_layer_by_layer(tiny: GetTiny, method: str) -> None:
    [output] = run(tiny("llama").packed_engine(16, method), [tokens(200, 3)], greedy(8))
    assert len(output.outputs[0].token_ids) == 8


def test_norms_after_a_branch_run_layer_by_layer(tiny: GetTiny, calls: list[int]) -> None:
    prompt = tokens(50, 4)
    engine = tiny("gemma3").packed_engine(16, "none")
    found = prompt_logprobs(engine, [prompt])[0]
    torch.testing.assert_close(found, tiny("gemma3").logprobs(prompt), rtol=0.1, atol=0.1)
    run(engine, [prompt], greedy(4))
    assert not calls


def test_programs_are_dropped_when_there_are_many(tiny: GetTiny) -> None:
    engine = tiny("llama").packed_engine(16, "none")
    prompts = [tokens(4, seed) for seed in range(KEPT + 5)]
    run(engine, prompts, [greedy(3 + index) for index in range(len(prompts))])
    assert len(engine._runner._programs._programs) == KEPT


def test_the_word_for_weights_is_checked_before_the_model_is_loaded() -> None:
    with pytest.raises(ConfigError, match="int8"):
        LLM("/no/such/model", weights="int9")
