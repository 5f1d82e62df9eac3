"""What a model is, as data: everything the decoder needs to know apart from the weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding (RoPE) of one kind of layer.

    `inv_freq` holds the head_dim / 2 angular frequencies (radians per token), any scaling variant
    already applied; cosines and sines are multiplied by `attention_factor` (YaRN; 1.0 otherwise).
    Dimension i is paired with dimension i + head_dim / 2.
    """

    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0


@dataclass(frozen=True)
class LayerSpec:
    """What may differ from layer to layer.

    `window` is the sliding window in tokens: query t sees the keys j with t - window < j <= t; None
    means all j <= t. `rope` is None for models with learned positions.
    """

    window: int | None
    rope: RopeSpec | None


@dataclass(frozen=True)
class NormSpec:
    """RMSNorm or LayerNorm. `unit_offset`: the stored weight w means a gain of 1 + w (Gemma)."""

    kind: Literal["rms", "layer"]
    eps: float
    unit_offset: bool = False


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only language model of one of the supported families.

    Sizes are in elements and positions in tokens. `attention_scale` multiplies the scores q.k before
    the softmax; `embed_scale` multiplies the token embeddings. `eos_token_ids` end a generation.
    """

    family: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int
    attention_scale: float
    layer_specs: tuple[LayerSpec, ...]
    norm: NormSpec
    activation: Activation
    gated_mlp: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    embed_scale: float = 1.0
    tie_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layer_specs)

    @property
    def kv_elements(self) -> int:
        """Numbers that the cache holds for a token: its keys and values in all layers."""
        return 2 * self.n_layers * self.kv_heads * self.head_dim

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads

    @property
    def rope(self) -> bool:
        """Whether any layer rotates queries and keys (if so, maps on keys cannot be folded into W_K)."""
        return any(layer.rope is not None for layer in self.layer_specs)

    @property
    def learned_positions(self) -> bool:
        """Whether positions enter as a learned embedding added to the token embedding (OPT, GPT-2)."""
        return not self.rope

    def rope_kinds(self) -> Iterator[RopeSpec]:
        """The distinct RoPE kinds of the layers, in order of first use."""
        yield from dict.fromkeys(layer.rope for layer in self.layer_specs if layer.rope is not None)
