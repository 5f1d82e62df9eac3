"""Reading model directories: shards, tied weights, tokenizers, and everything that can be wrong with them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvfold.errors import ConfigError, ModelError
from kvfold.model.loading import load_model, load_spec


def edit_config(directory: Path, **entries: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def edit_weights(directory: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def test_sharded_equals_single(
    save_model: Callable[..., Any],
    tiny_llama: Any,
    make_llama_config: Callable[..., Any],
    token_ids: Tensor,
    run: Callable[..., Tensor],
) -> None:
    sharded, _ = save_model(make_llama_config(), max_shard_size="30KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    one, many = (load_model(path, dtype=torch.float32) for path in (tiny_llama[0], sharded))
    assert torch.equal(run(one.decoder, token_ids), run(many.decoder, token_ids))
    assert one.fingerprint == many.fingerprint


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_share_memory(
    tied: bool, save_model: Callable[..., Any], make_llama_config: Callable[..., Any]
) -> None:
    loaded = load_model(save_model(make_llama_config(tie_word_embeddings=tied))[0], dtype=torch.bfloat16)
    weights = loaded.decoder.weights
    assert loaded.spec.tie_embeddings == tied
    assert (weights.head.weight.data_ptr() == weights.embedding.data_ptr()) == tied


def test_weights_outlive_their_files(tiny_llama: Any, token_ids: Tensor, run: Callable[..., Tensor]) -> None:
    loaded = load_model(tiny_llama[0], dtype=torch.float32)
    before = run(loaded.decoder, token_ids)
    path = tiny_llama[0] / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(run(loaded.decoder, token_ids), before)


def test_base_model_without_head_prefix(tiny_llama: Any, token_ids: Tensor, run: Callable[..., Tensor]) -> None:
    """Checkpoints of the bare decoder name their tensors without "model."."""
    expected = run(load_model(tiny_llama[0], dtype=torch.float32).decoder, token_ids)

    def strip(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    edit_weights(tiny_llama[0], strip)
    assert torch.equal(run(load_model(tiny_llama[0], dtype=torch.float32).decoder, token_ids), expected)


def test_stop_ids_come_from_generation_config_and_tokenizer(tiny_llama: Any) -> None:
    directory = tiny_llama[0]
    edit_config(directory, eos_token_id=5)
    (directory / "generation_config.json").unlink()
    assert load_spec(directory).eos_token_ids == (5,)
    (directory / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert load_spec(directory).eos_token_ids == (7, 8)
    loaded = load_model(directory, dtype=torch.float32)
    assert loaded.spec.eos_token_ids == (7, 8, 98)
    assert loaded.decoder.spec is loaded.spec
    assert loaded.tokenizer("w3 w4")["input_ids"] == [3, 4]


def test_other_dtypes_are_refused(tiny_llama: Any) -> None:
    with pytest.raises(ConfigError, match="float32 or bfloat16"):
        load_model(tiny_llama[0], dtype=torch.float16)


def test_missing_shard_is_named(save_model: Callable[..., Any], make_llama_config: Callable[..., Any]) -> None:
    directory, _ = save_model(make_llama_config(), max_shard_size="30KB")
    victim = sorted(directory.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(ModelError, match=f"{victim.name}.*download"):
        load_model(directory, dtype=torch.float32)


@pytest.mark.parametrize("keep", [0, 4, 500, 20_000])
def test_truncated_weights_are_refused(keep: int, tiny_llama: Any) -> None:
    path = tiny_llama[0] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match="truncated"):
        load_model(tiny_llama[0], dtype=torch.float32)


@pytest.mark.parametrize("index", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {}}'])
def test_corrupt_index_is_refused(index: str, tiny_llama: Any) -> None:
    (tiny_llama[0] / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError):
        load_model(tiny_llama[0], dtype=torch.float32)


def test_directory_without_safetensors(tiny_llama: Any) -> None:
    (tiny_llama[0] / "model.safetensors").rename(tiny_llama[0] / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_model(tiny_llama[0], dtype=torch.float32)


WEIGHT = "model.layers.1.self_attn.q_proj.weight"


def test_missing_weight_is_named(tiny_llama: Any) -> None:
    edit_weights(tiny_llama[0], lambda tensors: tensors.pop(WEIGHT))
    with pytest.raises(ModelError, match=WEIGHT):
        load_model(tiny_llama[0], dtype=torch.float32)


def test_weights_of_another_size_are_refused(tiny_llama: Any) -> None:
    edit_config(tiny_llama[0], intermediate_size=60)
    with pytest.raises(ModelError, match=r"gate_proj.*shape \[56, 48\].*\[60, 48\]"):
        load_model(tiny_llama[0], dtype=torch.float32)


def test_weights_that_would_be_ignored_are_refused(tiny_llama: Any) -> None:
    """A bias that config.json denies: running without it would give a wrong model silently."""
    edit_weights(tiny_llama[0], lambda t: t.update({WEIGHT.replace("weight", "bias"): torch.ones(48)}))
    with pytest.raises(ModelError, match=r"q_proj\.bias"):
        load_model(tiny_llama[0], dtype=torch.float32)


def test_stored_buffers_are_no_weights(tiny_llama: Any) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(tiny_llama[0], lambda tensors: tensors.update({name: torch.ones(4)}))
    load_model(tiny_llama[0], dtype=torch.float32)


def test_quantised_tensors_are_refused(tiny_llama: Any) -> None:
    edit_weights(tiny_llama[0], lambda t: t.update({WEIGHT: t[WEIGHT].to(torch.int8)}))
    with pytest.raises(ModelError, match="quantised"):
        load_model(tiny_llama[0], dtype=torch.float32)


def test_missing_tokenizer_is_named(tiny_llama: Any) -> None:
    for path in tiny_llama[0].glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        load_model(tiny_llama[0], dtype=torch.float32)


@pytest.mark.parametrize("text", ["", "{", "[]", "\0\1", '{"model_type": ["llama"]}', "{}"])
def test_unreadable_config_is_refused(text: str, tiny_llama: Any) -> None:
    (tiny_llama[0] / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json|supported"):
        load_spec(tiny_llama[0])


def test_missing_config_is_named(tiny_llama: Any) -> None:
    (tiny_llama[0] / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json"):
        load_spec(tiny_llama[0])


@pytest.mark.parametrize(
    "entries",
    [
        {"num_attention_heads": 5},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 0},
        {"num_attention_heads": 0},
        {"hidden_size": "wide"},
        {"num_hidden_layers": 0},
        {"max_position_embeddings": -1},
        {"rope_parameters": {"rope_type": "yarn"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": "ten"}},
    ],
)
def test_impossible_configs_are_refused(entries: dict[str, Any], tiny_llama: Any) -> None:
    edit_config(tiny_llama[0], **entries)
    with pytest.raises(ModelError):
        load_spec(tiny_llama[0])


def test_older_names_of_rope_settings_are_read(tiny_llama: Any) -> None:
    """Most configs on the hub predate `rope_parameters`."""
    directory = tiny_llama[0]
    settings = {"rope_type": "linear", "rope_theta": 700.0, "factor": 2.0}
    edit_config(directory, rope_parameters=settings)
    expected = load_spec(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    older = {"rope_theta": 700.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    path.write_text(json.dumps(config | older))
    assert load_spec(directory) == expected
    rope = expected.layer_specs[0].rope
    assert rope is not None
    assert rope.inv_freq[:2] == pytest.approx((0.5, 0.5 * 700 ** (-2 / 8)))


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ({"model_type": "mixtral"}, "mixtral.*llama"),
        ({"model_type": "nonesuch"}, "nonesuch.*gpt2"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
        ({"hidden_act": "relu2"}, "relu2.*silu"),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "proportional.*llama3"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "part",
        ),
    ],
)
def test_unsupported_llamas_are_named(entries: dict[str, Any], named: str, tiny_llama: Any) -> None:
    edit_config(tiny_llama[0], **entries)
    with pytest.raises(ModelError, match=named):
        load_spec(tiny_llama[0])


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (hf.OPTConfig(do_layer_norm_before=False), "opt-350m"),
        (hf.OPTConfig(word_embed_proj_dim=512), "opt-350m"),
        (hf.OPTConfig(layer_norm_elementwise_affine=False), "norms"),
        (hf.GPT2Config(scale_attn_by_inverse_layer_idx=True), "by layer"),
        (hf.Gemma3TextConfig(final_logit_softcapping=30.0), "caps"),
        (hf.Gemma3TextConfig(use_bidirectional_attention=True), "both directions"),
        (hf.Qwen2Config(num_hidden_layers=1, layer_types=["chunked_attention"]), "chunked_attention"),
    ],
)
def test_unsupported_variants_are_named(config: Any, named: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=named):
        load_spec(tmp_path)
