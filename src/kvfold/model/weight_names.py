"""Where each family keeps its weights in a checkpoint, as a table."""

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class WeightNames:
    """Tensor names of one family, without ".weight" and ".bias"; None: the family has no such part.

    `prefixes` are the places where the decoder may sit in a checkpoint, tried in order. `head` names are
    absolute. The names below `layers` are relative to one layer, "<prefix><layers>.<index>.".
    Exactly one of `qkv` (fused) and `q`, `k`, `v` is given. `transposed`: layer matrices are stored
    as [inputs, outputs]. The learned positions start after `position_offset` unused rows.
    """

    prefixes: tuple[str, ...]
    heads: tuple[str, ...]
    embedding: str
    final_norm: str
    layers: str
    attention_norm: str
    mlp_norm: str
    out: str
    up: str
    down: str
    q: str | None = None
    k: str | None = None
    v: str | None = None
    qkv: str | None = None
    gate: str | None = None
    q_norm: str | None = None
    k_norm: str | None = None
    post_attention_norm: str | None = None
    post_mlp_norm: str | None = None
    positions: str | None = None
    position_offset: int = 0
    transposed: bool = False


_LLAMA = WeightNames(
    prefixes=("model.", ""),
    heads=("lm_head",),
    embedding="embed_tokens",
    final_norm="norm",
    layers="layers",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    out="self_attn.o_proj",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
)

_QWEN3 = replace(_LLAMA, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")

_GEMMA3 = replace(
    _QWEN3,
    # The later ones are the multimodal checkpoints, old and new naming.
    prefixes=("model.", "", "language_model.model.", "model.language_model."),
    heads=("lm_head", "language_model.lm_head"),
    mlp_norm="pre_feedforward_layernorm",
    post_attention_norm="post_attention_layernorm",
    post_mlp_norm="post_feedforward_layernorm",
)

_OPT = WeightNames(
    prefixes=("model.decoder.", "decoder.", ""),
    heads=("lm_head",),
    embedding="embed_tokens",
    positions="embed_positions",
    position_offset=2,
    final_norm="final_layer_norm",
    layers="layers",
    attention_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    out="self_attn.out_proj",
    up="fc1",
    down="fc2",
)

_GPT2 = WeightNames(
    prefixes=("transformer.", ""),
    heads=("lm_head",),
    embedding="wte",
    positions="wpe",
    final_norm="ln_f",
    layers="h",
    attention_norm="ln_1",
    mlp_norm="ln_2",
    qkv="attn.c_attn",
    out="attn.c_proj",
    up="mlp.c_fc",
    down="mlp.c_proj",
    transposed=True,
)

WEIGHT_NAMES: Mapping[str, WeightNames] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _QWEN3,
    "gemma3": _GEMMA3,
    "opt": _OPT,
    "gpt2": _GPT2,
}
