"""The attention weights of one layer: the one part of a model that a method may replace."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class AttentionWeights:
    """Projections of one layer, and the optional maps applied after RoPE.

    H query heads, G KV heads, d = head_dim, D = hidden. All tensors share the decoder's dtype and
    device and need no gradient. A method's transform returns a new object and never mutates one.

    qkv:       [(H + 2 G) * d, D], rows of W_Q, then W_K, then W_V
    qkv_bias:  [(H + 2 G) * d] or None
    out:       [D, H * d]
    out_bias:  [D] or None
    query_map: [G, d, d] or None;  q'[t, h] = q[t, h] @ query_map[h // group]
    key_map:   [G, d, d] or None;  k'[t, g] = k[t, g] @ key_map[g] + key_shift[g]
    key_shift: [G, d] or None
    The maps act on queries and keys after QK norm and RoPE.
    """

    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    query_map: Tensor | None = None
    key_map: Tensor | None = None
    key_shift: Tensor | None = None
