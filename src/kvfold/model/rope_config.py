"""RoPE frequencies of a Hugging Face config, scaling variants included."""

from typing import TYPE_CHECKING

import torch

from kvfold.errors import ModelError
from kvfold.model.spec import RopeSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn")


def rope_spec(config: "PreTrainedConfig", layer_type: str | None = None) -> RopeSpec:
    """The RoPE of `config`, or of one of its layer types where these differ (Gemma 3).

    "dynamic" is taken at max_position_embeddings, the longest sequence that is served, where it changes
    nothing. Raises ModelError for other scalings and for heads that are rotated in part only.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = config.rope_parameters
    if layer_type is not None:
        parameters = parameters[layer_type]
    kind = parameters["rope_type"]
    if kind not in SCALINGS:
        raise ModelError(f"RoPE scaling {kind!r} is not supported: choose one of {', '.join(SCALINGS)}")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("RoPE on a part of each head is not supported: use a model that rotates whole heads")
    if kind == "default":
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return RopeSpec(tuple((1.0 / parameters["rope_theta"] ** exponents).tolist()))
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[kind](config, None, layer_type=layer_type)
    return RopeSpec(tuple(inv_freq.tolist()), float(attention_factor))
