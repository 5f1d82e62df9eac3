"""What each supported family makes of its Hugging Face config: the only place that knows the families."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kvfold.errors import ModelError
from kvfold.model.rope_config import rope_spec
from kvfold.model.spec import Activation, LayerSpec, ModelSpec, NormSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def _unsupported(family: str, what: str, remedy: str) -> ModelError:
    return ModelError(f"this {family} model {what}, which is not supported: {remedy}")


def _activation(family: str, name: str) -> Activation:
    if name not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise _unsupported(family, f"uses the activation {name!r}", f"choose one of {known}")
    return _ACTIVATIONS[name]


def _windows(family: str, config: "PreTrainedConfig", layer_types: list[str]) -> list[int | None]:
    known = ("full_attention", "sliding_attention")
    for kind in layer_types:
        if kind not in known:
            raise _unsupported(family, f"has layers of type {kind!r}", f"supported are {' and '.join(known)}")
    return [config.sliding_window if kind == "sliding_attention" else None for kind in layer_types]


def _rms_model(family: str, config: "PreTrainedConfig", layers: list[LayerSpec], **more: Any) -> ModelSpec:
    """The fields that the families with RMSNorm, RoPE and a gated MLP read alike."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fields: dict[str, Any] = {
        "activation": _activation(family, getattr(config, "hidden_act", "silu")),
        "attention_scale": float(head_dim) ** -0.5,
        "norm": NormSpec("rms", config.rms_norm_eps),
    }
    return ModelSpec(
        family=family,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        intermediate=config.intermediate_size,
        vocab=config.vocab_size,
        max_positions=config.max_position_embeddings,
        layer_specs=tuple(layers),
        tie_embeddings=bool(config.tie_word_embeddings),
        **(fields | more),
    )


def _llama(config: "PreTrainedConfig") -> ModelSpec:
    layers = [LayerSpec(None, rope_spec(config))] * config.num_hidden_layers
    bias = bool(config.attention_bias)
    return _rms_model("llama", config, layers, qkv_bias=bias, out_bias=bias, mlp_bias=bool(config.mlp_bias))


def _mistral(config: "PreTrainedConfig") -> ModelSpec:
    layers = [LayerSpec(config.sliding_window, rope_spec(config))] * config.num_hidden_layers
    return _rms_model("mistral", config, layers)


def _qwen_layers(family: str, config: "PreTrainedConfig") -> list[LayerSpec]:
    rope = rope_spec(config)
    return [LayerSpec(window, rope) for window in _windows(family, config, config.layer_types)]


def _qwen2(config: "PreTrainedConfig") -> ModelSpec:
    return _rms_model("qwen2", config, _qwen_layers("qwen2", config), qkv_bias=True)


def _qwen3(config: "PreTrainedConfig") -> ModelSpec:
    bias = bool(config.attention_bias)
    layers = _qwen_layers("qwen3", config)
    return _rms_model("qwen3", config, layers, qk_norm=True, qkv_bias=bias, out_bias=bias)


def _gemma3(config: "PreTrainedConfig") -> ModelSpec:
    if config.final_logit_softcapping or config.attn_logit_softcapping:
        raise _unsupported("gemma3", "caps its logits", "use a Gemma 3 model as published")
    if config.use_bidirectional_attention:
        raise _unsupported("gemma3", "attends in both directions", "use a model that generates text")
    ropes = {kind: rope_spec(config, kind) for kind in dict.fromkeys(config.layer_types)}
    windows = _windows("gemma3", config, config.layer_types)
    bias = bool(config.attention_bias)
    return _rms_model(
        "gemma3",
        config,
        [LayerSpec(window, ropes[kind]) for window, kind in zip(windows, config.layer_types, strict=True)],
        norm=NormSpec("rms", config.rms_norm_eps, unit_offset=True),
        activation=_activation("gemma3", config.hidden_activation),
        attention_scale=float(config.query_pre_attn_scalar) ** -0.5,
        embed_scale=float(config.hidden_size) ** 0.5,
        qk_norm=True,
        post_norms=True,
        qkv_bias=bias,
        out_bias=bias,
    )


def _layer_norm_model(
    family: str, config: "PreTrainedConfig", *, intermediate: int, eps: float, bias: bool, scaled: bool = True
) -> ModelSpec:
    """The fields that the families with LayerNorm and learned positions read alike."""
    head_dim = config.hidden_size // config.num_attention_heads
    return ModelSpec(
        family=family,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_dim=head_dim,
        intermediate=intermediate,
        vocab=config.vocab_size,
        max_positions=config.max_position_embeddings,
        attention_scale=float(head_dim) ** -0.5 if scaled else 1.0,
        layer_specs=(LayerSpec(None, None),) * config.num_hidden_layers,
        norm=NormSpec("layer", eps),
        activation=_activation(family, config.activation_function),
        gated_mlp=False,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        tie_embeddings=bool(config.tie_word_embeddings),
    )


def _opt(config: "PreTrainedConfig") -> ModelSpec:
    remedy = "choose a pre-norm OPT without projections, such as 125m, 1.3b or larger"
    if not config.do_layer_norm_before or config._remove_final_layer_norm:
        raise _unsupported("opt", "normalises after its layers (as opt-350m does)", remedy)
    if config.word_embed_proj_dim != config.hidden_size:
        raise _unsupported("opt", "projects its embeddings (as opt-350m does)", remedy)
    if not config.layer_norm_elementwise_affine:
        raise _unsupported("opt", "has norms without weights", remedy)
    # OPT's config does not carry the epsilon: its LayerNorms use torch's default.
    return _layer_norm_model("opt", config, intermediate=config.ffn_dim, eps=1e-5, bias=bool(config.enable_bias))


def _gpt2(config: "PreTrainedConfig") -> ModelSpec:
    if config.scale_attn_by_inverse_layer_idx or config.add_cross_attention:
        raise _unsupported("gpt2", "scales attention by layer or has cross attention", "use a GPT-2 as published")
    return _layer_norm_model(
        "gpt2",
        config,
        intermediate=config.n_inner or 4 * config.hidden_size,
        eps=config.layer_norm_epsilon,
        bias=True,
        scaled=bool(config.scale_attn_weights),
    )


FAMILIES: Mapping[str, Callable[["PreTrainedConfig"], ModelSpec]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "opt": _opt,
    "gpt2": _gpt2,
}
