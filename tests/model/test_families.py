"""Every family and variant gives the logits that transformers gives."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from kvfold.model.loading import load_model, load_spec

SIZES = {
    "vocab_size": 99,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "intermediate_size": 56,
    "max_position_embeddings": 64,
}
GQA = SIZES | {"num_key_value_heads": 2}
ROPE = {"rope_theta": 5000.0}
ORIGINAL = {"original_max_position_embeddings": 16}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**GQA),
    "llama-mha": lambda: hf.LlamaConfig(**SIZES, num_key_value_heads=6),
    "llama-mqa-head_dim": lambda: hf.LlamaConfig(**SIZES, num_key_value_heads=1, head_dim=10),
    "llama-biases": lambda: hf.LlamaConfig(**GQA, attention_bias=True, mlp_bias=True),
    "llama-tied": lambda: hf.LlamaConfig(**GQA, tie_word_embeddings=True),
    "llama-linear": lambda: hf.LlamaConfig(**GQA, rope_parameters=ROPE | {"rope_type": "linear", "factor": 3.0}),
    "llama-dynamic": lambda: hf.LlamaConfig(**GQA, rope_parameters=ROPE | {"rope_type": "dynamic", "factor": 3.0}),
    "llama-llama3": lambda: hf.LlamaConfig(
        **GQA,
        rope_parameters=ROPE
        | ORIGINAL
        | {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
    "llama-yarn": lambda: hf.LlamaConfig(**GQA, rope_parameters=ROPE | ORIGINAL | {"rope_type": "yarn", "factor": 4.0}),
    "mistral": lambda: hf.MistralConfig(**GQA, sliding_window=None),
    "mistral-window": lambda: hf.MistralConfig(**GQA, sliding_window=7),
    "qwen2": lambda: hf.Qwen2Config(**GQA),
    "qwen2-window": lambda: hf.Qwen2Config(**GQA, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": lambda: hf.Qwen3Config(**GQA, head_dim=16),
    "qwen3-window": lambda: hf.Qwen3Config(
        **GQA,
        head_dim=8,
        use_sliding_window=True,
        sliding_window=9,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **GQA, head_dim=16, sliding_window=6, sliding_window_pattern=2, query_pre_attn_scalar=10
    ),
    "gemma3-long": lambda: hf.Gemma3TextConfig(
        **GQA,
        head_dim=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    "opt": lambda: hf.OPTConfig(
        vocab_size=99,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=6,
        ffn_dim=56,
        max_position_embeddings=64,
        word_embed_proj_dim=48,
    ),
    "opt-no-biases": lambda: hf.OPTConfig(
        vocab_size=99,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=56,
        max_position_embeddings=40,
        enable_bias=False,
        tie_word_embeddings=False,
    ),
    "gpt2": lambda: hf.GPT2Config(vocab_size=99, n_positions=64, n_embd=48, n_layer=3, n_head=6),
    "gpt2-inner": lambda: hf.GPT2Config(
        vocab_size=99, n_positions=40, n_embd=48, n_layer=2, n_head=3, n_inner=20, scale_attn_weights=False
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_transformers(
    name: str, save_model: Callable[..., Any], token_ids: Tensor, run: Callable[..., Tensor]
) -> None:
    directory, reference = save_model(CONFIGS[name]())
    loaded = load_model(directory, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(token_ids[None]).logits[0]
        logits = run(loaded.decoder, token_ids)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_spec_is_read_without_weights(name: str, save_model: Callable[..., Any]) -> None:
    directory, reference = save_model(CONFIGS[name]())
    (directory / "model.safetensors").unlink()
    spec = load_spec(directory)
    config = reference.config
    assert spec.family == name.split("-")[0]
    assert spec.n_layers == config.num_hidden_layers
    assert spec.heads == config.num_attention_heads
    assert spec.group * spec.kv_heads == spec.heads
    assert spec.rope != (spec.family in ("opt", "gpt2"))
    assert spec.max_positions == config.max_position_embeddings


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "opt", "gpt2"])
def test_bfloat16_is_as_near_to_float32_as_transformers_is(
    name: str, save_model: Callable[..., Any], token_ids: Tensor, run: Callable[..., Tensor]
) -> None:
    directory, reference = save_model(CONFIGS[name]())
    loaded = load_model(directory, dtype=torch.bfloat16)
    assert loaded.decoder.dtype == torch.bfloat16
    with torch.no_grad():
        exact = reference(token_ids[None]).logits[0]
        rounded = reference.to(torch.bfloat16)(token_ids[None]).logits[0].float()
        logits = run(loaded.decoder, token_ids)
    assert (logits - exact).norm() <= 1.5 * (rounded - exact).norm()


@pytest.mark.parametrize("name", ["llama-biases", "llama-tied", "qwen3", "gemma3", "opt", "gpt2"])
@pytest.mark.parametrize(("bits", "bound"), [(16, 0.02), (8, 0.08)])
def test_packed_weights_are_nearly_the_same_model(
    name: str, bits: int, bound: float, save_model: Callable[..., Any], token_ids: Tensor, run: Callable[..., Tensor]
) -> None:
    """Everything in float32 but the weights (and, where they are coded, the activations before each product)."""
    directory, reference = save_model(CONFIGS[name]())
    decoder = load_model(directory, dtype=torch.float32).decoder
    decoder.pack(bits)
    with torch.inference_mode():
        expected = reference(token_ids[None]).logits[0]
        logits = run(decoder, token_ids)
    assert logits.dtype == torch.float32
    error = (logits - expected).norm() / expected.norm()
    assert error <= bound


def test_packed_weights_with_heads_too_wide_for_the_kernels(
    save_model: Callable[..., Any], token_ids: Tensor, run: Callable[..., Tensor]
) -> None:
    """Their heads are torch's, in the dtype of the activations: maps stay as they were."""
    config = hf.LlamaConfig(**(SIZES | {"num_attention_heads": 2, "num_key_value_heads": 1}), head_dim=264)
    decoder = load_model(save_model(config)[0], dtype=torch.bfloat16).decoder
    maps = torch.eye(264, dtype=torch.bfloat16)[None]
    expected = run(decoder, token_ids)
    decoder.projections = [replace(own, query_map=maps, key_map=maps) for own in decoder.projections]
    decoder.pack(16)
    assert (run(decoder, token_ids) - expected).norm() <= 0.05 * expected.norm()


def test_window_hides_what_is_older(
    save_model: Callable[..., Any], token_ids: Tensor, run: Callable[..., Tensor]
) -> None:
    config = hf.MistralConfig(**(GQA | {"num_hidden_layers": 1}), sliding_window=7)
    decoder = load_model(save_model(config)[0], dtype=torch.float32).decoder
    changed = token_ids.clone()
    changed[:20] = (changed[:20] + 1) % 99
    before, after = run(decoder, token_ids), run(decoder, changed)
    assert torch.equal(before[26:], after[26:])
    assert not torch.allclose(before[25], after[25])


def test_multimodal_gemma3_runs_its_text_model(
    save_model: Callable[..., Any], token_ids: Tensor, run: Callable[..., Tensor], tmp_path: Any
) -> None:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    text = CONFIGS["gemma3"]().to_dict()
    config = hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    reference = hf.Gemma3ForConditionalGeneration(config).eval()
    directory, _ = save_model(CONFIGS["llama"]())  # for its tokenizer
    (directory / "model.safetensors").unlink()
    reference.save_pretrained(directory)
    loaded = load_model(directory, dtype=torch.float32)
    assert loaded.spec.family == "gemma3"
    with torch.no_grad():
        expected = reference(token_ids[None]).logits[0]
        torch.testing.assert_close(run(loaded.decoder, token_ids), expected, rtol=1e-4, atol=1e-4)
