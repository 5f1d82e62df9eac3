"""One pass over calibration text: Grams of queries, keys and values, samples of rows, and gradient Grams."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kvfold.calibration.tapped import tapped_attention
from kvfold.model.decoder import Decoder, Lane

LOGIT_TILE = 512  # tokens whose logits are held at once
SINKS = 4  # first tokens, never sealed: outliers that must not shape the maps
NEAR = 136  # recent tokens a query meets exactly: the default window and half a seal unit


@dataclass
class Moments:
    """Sums over tokens of one kind of row, float64 [L, G, d] and [L, G, d, d]; `count` tokens each."""

    total: Tensor
    gram: Tensor
    count: int = 0

    @classmethod
    def zeros(cls, layers: int, heads: int, d: int) -> "Moments":
        return cls(torch.zeros(layers, heads, d).double(), torch.zeros(layers, heads, d, d).double())

    def add(self, layer: int, rows: Tensor) -> None:
        """rows: [G, n, d]"""
        self.total[layer] += rows.sum(1)
        self.gram[layer] += rows.mT @ rows
        if layer == 0:
            self.count += rows.shape[1]

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        return self.gram / self.count - self.mean[..., :, None] * self.mean[..., None, :]


class Capture:
    """Runs sequences through a decoder and keeps what calibration needs of every layer and KV head."""

    def __init__(self, decoder: Decoder, samples: int, windows: int, seed: int = 0) -> None:
        spec = decoder.spec
        shape = (spec.n_layers, spec.kv_heads, spec.head_dim)
        self.query, self.key, self.value = (Moments.zeros(*shape) for _ in range(3))
        self.key_gradient, self.value_gradient = (torch.zeros(*shape, spec.head_dim) for _ in range(2))
        self.samples: dict[str, list[list[Tensor]]] = {
            side: [[] for _ in range(spec.n_layers)] for side in ("key", "value")
        }
        self._decoder = decoder
        self._per_window = -(-samples // windows)
        self._generator = torch.Generator().manual_seed(seed)

    def run(self, tokens: Tensor) -> float:
        """One sequence of tokens int64 [T], forward and backward. Returns its mean negative log-likelihood."""
        count = len(tokens)
        positions = torch.arange(count)
        picked = SINKS + torch.randperm(count - SINKS, generator=self._generator)[: self._per_window]
        near_start = (positions + 1 - NEAR).clamp(min=SINKS)
        spec = self._decoder.spec

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with torch.no_grad():
                self._observe(layer, q, k, v, picked)
            # The first layer's inputs do not depend on anything that needs a gradient: its far use does.
            k, v = k.requires_grad_(), v.requires_grad_()

            def receive(dk: Tensor, dv: Tensor) -> None:
                self.key_gradient[layer] += dk.mT @ dk
                self.value_gradient[layer] += dv.mT @ dv

            window = spec.layer_specs[layer].window
            return tapped_attention(q, k, v, spec.attention_scale, window, near_start, SINKS, receive)

        lane = Lane(slice(0, count), self._decoder.attention_weights, attend)
        hidden = self._decoder.forward(tokens, positions, [lane])
        loss = torch.stack(
            [
                checkpoint(
                    self._nll, hidden[i : i + LOGIT_TILE], tokens[i + 1 : i + 1 + LOGIT_TILE], use_reentrant=False
                )
                for i in range(0, count - 1, LOGIT_TILE)
            ]
        ).sum()
        loss.backward()
        return float(loss.detach()) / (count - 1)

    def _nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self._decoder.logits(hidden[: len(targets)]), targets, reduction="sum")

    def _observe(self, layer: int, q: Tensor, k: Tensor, v: Tensor, picked: Tensor) -> None:
        group = self._decoder.spec.group
        keys, values = (x[SINKS:].transpose(0, 1).float() for x in (k, v))
        queries = q[SINKS:].unflatten(1, (-1, group)).permute(1, 2, 0, 3).flatten(1, 2).float()
        self.query.add(layer, queries)
        self.key.add(layer, keys)
        self.value.add(layer, values)
        for side, rows in (("key", k), ("value", v)):
            self.samples[side][layer].append(rows[picked].transpose(0, 1).float())

    def sampled(self, side: str) -> Tensor:
        """Rows picked at random, float32 [L, G, n, d]."""
        return torch.stack([torch.cat(layer, 1) for layer in self.samples[side]])
