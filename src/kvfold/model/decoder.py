"""The decoder: one block for every family, over a flattened batch of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfold.methods.base import AttentionWeights
from kvfold.model.blocks import DecoderWeights, HeadNorm
from kvfold.model.rope import Rotation, rotate, rotation
from kvfold.model.spec import ModelSpec


class Attend(Protocol):
    """Attention of one lane in one layer; masks, softmax scale and the cache are its business."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, H, d], new k and v [T, G, d], after RoPE and maps -> [T, H, d], same dtype.

        T counts the lane's tokens only. The inputs may have any strides; they are not to be mutated.
        """
        ...


@dataclass
class Lane:
    """A range of a batch's tokens that shares one compression method.

    `weights` has one entry per layer (the decoder's own, or a method's folded ones). Norms, MLP and
    embeddings are shared by all lanes.
    """

    tokens: slice
    weights: Sequence[AttentionWeights]
    attend: Attend


class Decoder:
    """A decoder-only model. Weights carry no gradient; activations may (calibration differentiates)."""

    def __init__(self, spec: ModelSpec, weights: DecoderWeights) -> None:
        self.spec = spec
        self.weights = weights
        self.attention_weights: list[AttentionWeights] = [layer.attention for layer in weights.layers]
        self._embed_scale = float(torch.tensor(spec.embed_scale, dtype=self.dtype))
        kinds = list(spec.rope_kinds())
        self._rope_kinds = [
            (torch.tensor(kind.inv_freq, dtype=torch.float32, device=self.device), kind.attention_factor)
            for kind in kinds
        ]
        self._rope_kind_of_layer = [
            None if layer.rope is None else kinds.index(layer.rope) for layer in spec.layer_specs
        ]

    @property
    def dtype(self) -> torch.dtype:
        """dtype of weights and activations."""
        return self.weights.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Device of weights and activations."""
        return self.weights.embedding.device

    def forward(self, token_ids: Tensor, positions: Tensor, lanes: Sequence[Lane]) -> Tensor:
        """Hidden states after the final norm, [T, D].

        token_ids and positions: [T] int64, the sequences of a batch concatenated without padding.
        Lanes: consecutive, together exactly the T tokens; raises ValueError otherwise.
        """
        _check_lanes(lanes, token_ids.shape[0])
        x = self._embed(token_ids, positions)
        rotations = [rotation(*kind, positions, self.dtype) for kind in self._rope_kinds]
        for index, layer in enumerate(self.weights.layers):
            kind = self._rope_kind_of_layer[index]
            by = None if kind is None else rotations[kind]
            branch = self._attention(index, layer.attention_norm(x), by, lanes)
            if layer.post_attention_norm is not None:
                branch = layer.post_attention_norm(branch)
            x = x + branch
            branch = layer.mlp(layer.mlp_norm(x))
            if layer.post_mlp_norm is not None:
                branch = layer.post_mlp_norm(branch)
            x = x + branch
        return self.weights.final_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits of hidden states [N, D]: [N, V] float32."""
        return F.linear(hidden, self.weights.head).float()

    def _embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        x = F.embedding(token_ids, self.weights.embedding)
        if self.spec.embed_scale != 1.0:
            x = x * self._embed_scale
        if self.weights.positions is not None:
            x = x + F.embedding(positions, self.weights.positions)
        return x

    def _attention(self, index: int, x: Tensor, by: Rotation | None, lanes: Sequence[Lane]) -> Tensor:
        head_norm = self.weights.layers[index].head_norm
        outputs = []
        for lane in lanes:
            weights = lane.weights[index]
            lane_by = None if by is None else by.take(lane.tokens)
            q, k, v = self._project(weights, x[lane.tokens], head_norm, lane_by)
            attended = lane.attend(index, q, k, v)
            outputs.append(F.linear(attended.flatten(1), weights.out, weights.out_bias))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _project(
        self, weights: AttentionWeights, x: Tensor, head_norm: HeadNorm | None, by: Rotation | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        spec = self.spec
        heads, end = spec.heads, spec.heads + spec.kv_heads
        qkv = F.linear(x, weights.qkv, weights.qkv_bias).view(x.shape[0], end + spec.kv_heads, spec.head_dim)
        qk, v = qkv[:, :end], qkv[:, end:]
        if head_norm is not None:
            qk = head_norm(qk)
        if by is not None:
            qk = rotate(qk, by)
        q, k = qk[:, :heads], qk[:, heads:]
        if weights.query_map is not None:
            q = _map_heads(q, weights.query_map)
        if weights.key_map is not None:
            k = _map_heads(k, weights.key_map)
        if weights.key_shift is not None:
            k = k + weights.key_shift
        return q, k, v


def _map_heads(x: Tensor, maps: Tensor) -> Tensor:
    """Apply maps [G, d, d] to x [T, n, d] whose heads come in G equal groups: one batched product."""
    tokens, heads, dim = x.shape
    groups = maps.shape[0]
    by_group = x.reshape(tokens, groups, -1, dim).transpose(0, 1).reshape(groups, -1, dim)
    mapped = torch.bmm(by_group, maps)
    return mapped.view(groups, tokens, -1, dim).transpose(0, 1).reshape(tokens, heads, dim)


def _check_lanes(lanes: Sequence[Lane], tokens: int) -> None:
    end = 0
    for lane in lanes:
        start, stop, step = lane.tokens.indices(tokens)
        if start != end or step != 1:
            raise ValueError(f"lane {lane.tokens} does not start at token {end}: lanes must be consecutive")
        end = stop
    if end != tokens:
        raise ValueError(f"lanes cover {end} of {tokens} tokens: every token belongs to one lane")
