"""What `info` says of a cache is what the engine then holds."""

from pathlib import Path

import pytest

from kvfold import LLM, SamplingParams
from kvfold.errors import ConfigError
from kvfold.evaluation.info import describe


def test_a_model_is_described_without_its_weights(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    info = describe(tmp_path, "none", 2**20)
    assert (info.family, info.layers, info.heads, info.kv_heads, info.head_dim) == ("llama", 2, 4, 2, 16)
    assert (info.hidden, info.max_positions) == (64, 512)
    assert info.dense_bytes_per_token == info.bytes_per_token == 2 * 2 * 16 * 2 * 2
    assert info.tokens_in_memory == 2**20 // info.dense_bytes_per_token


@pytest.mark.parametrize("method", ["zeroc(bits=4)", "zeroc(bits=2)", "zeroc(rank=8)"])
def test_a_calibrated_method_needs_no_calibration_to_be_described(tiny_llama: Path, method: str) -> None:
    info = describe(tiny_llama, method, 2**24)
    bits = 16 * info.bytes_per_token / info.dense_bytes_per_token
    assert bits == pytest.approx({"zeroc(bits=4)": 4, "zeroc(bits=2)": 2, "zeroc(rank=8)": 8}[method], rel=0.02)
    assert info.tokens_in_memory == pytest.approx(2**24 / info.bytes_per_token, rel=0.02)


def test_the_tokens_told_are_those_that_fit(tiny_llama: Path) -> None:
    told = describe(tiny_llama, "none", 2**15).tokens_in_memory
    llm = LLM(tiny_llama, kv_memory=2**15, dtype="float32", kv_dtype="bfloat16")
    params = SamplingParams(max_tokens=500, temperature=0, ignore_eos=True)
    output = llm.generate([[5] * 20], params)[0]
    assert 20 + len(output.outputs[0].token_ids) == told == 128


def test_an_unknown_method_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="zeroc"):
        describe(tiny_llama, "zerocs(bits=4)", 2**20)
