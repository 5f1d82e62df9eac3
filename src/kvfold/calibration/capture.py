"""One pass over calibration text: Grams of queries, keys and values, samples of rows, and gradient Grams."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kvfold.calibration.tapped import tapped_attention
from kvfold.methods.calibrated import SIDES
from kvfold.model.decoder import Decoder, Lane

LOGIT_TILE = 512  # tokens whose logits are held at once
SINKS = 4  # first tokens, never sealed: outliers that must not shape the maps
NEAR = 136  # recent tokens a query meets exactly: the default window and half a seal unit
FIT_EVEN = 0.1  # share of a token's weight for the quantisers that does not depend on its cost (docs/performance.md)
MAX_COST = 50.0  # in units of the mean: no token may outweigh all others


@dataclass
class Moments:
    """Sums over tokens of one kind of row: float64 [L, G, d] and [L, G, d, d], and how many they were, [L]."""

    total: Tensor
    gram: Tensor
    count: Tensor

    @classmethod
    def zeros(cls, layers: int, heads: int, d: int) -> "Moments":
        shapes = (layers, heads, d), (layers, heads, d, d), (layers,)
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def add(self, layer: int, rows: Tensor) -> None:
        """rows: [G, n, d]"""
        self.total[layer] += rows.sum(1)
        self.gram[layer] += rows.mT @ rows
        self.count[layer] += rows.shape[1]

    @property
    def covariance(self) -> Tensor:
        """Of the centred rows, [L, G, d, d]."""
        mean = self.total / self.count[:, None, None]
        return self.gram / self.count[:, None, None, None] - mean[..., :, None] * mean[..., None, :]


class Capture:
    """Runs sequences through a decoder and keeps what calibration needs of every layer and KV head."""

    def __init__(self, decoder: Decoder, samples: int, windows: int, seed: int = 0) -> None:
        spec = decoder.spec
        shape = (spec.n_layers, spec.kv_heads, spec.head_dim)
        self.query = Moments.zeros(*shape)
        self.moments = {side: Moments.zeros(*shape) for side in SIDES}
        self.gradients = {side: torch.zeros(*shape, spec.head_dim) for side in SIDES}
        self._samples: dict[str, list[list[Tensor]]] = {side: [[] for _ in range(spec.n_layers)] for side in SIDES}
        self._decoder = decoder
        self._per_window = -(-samples // windows)
        self._generator = torch.Generator().manual_seed(seed)

    def run(self, tokens: Tensor, first: int = 0) -> float:
        """One sequence of tokens int64 [T], forward and backward. Returns its mean negative log-likelihood.

        first: position of the first token. A model with RoPE sees distances alone and computes the same anywhere,
        but its keys and queries are rotated by where they are: short sequences stand for long ones this way.
        """
        count = len(tokens)
        positions = torch.arange(count)
        near_start = (positions + 1 - NEAR).clamp(min=SINKS)
        spec = self._decoder.spec

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with torch.no_grad():
                queries = q[SINKS:].unflatten(1, (-1, spec.group)).permute(1, 2, 0, 3).flatten(1, 2).float()
                self.query.add(layer, queries)
            # The first layer's inputs do not depend on anything that needs a gradient: its far use does.
            k, v = k.requires_grad_(), v.requires_grad_()

            def receive(dk: Tensor, dv: Tensor) -> None:
                self._observe("key", layer, k.detach(), dk)
                self._observe("value", layer, v.detach(), dv)

            window = spec.layer_specs[layer].window
            return tapped_attention(q, k, v, spec.attention_scale, window, near_start, SINKS, receive)

        lane = Lane(slice(0, count), self._decoder.projections, attend)
        hidden = self._decoder.forward(tokens, first + positions, [lane])
        tiles = zip(hidden[:-1].split(LOGIT_TILE), tokens[1:].split(LOGIT_TILE), strict=True)
        loss = torch.stack([checkpoint(self._nll, *tile, use_reentrant=False) for tile in tiles]).sum()
        loss.backward()
        return float(loss.detach()) / (count - 1)

    def _nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self._decoder.logits(hidden), targets, reduction="sum")

    def _observe(self, side: str, layer: int, rows: Tensor, gradient: Tensor) -> None:
        """rows: [T, G, d]; gradient: of the loss with respect to their far use, [G, T, d].

        Quantisers are fitted to tokens mostly by what an error in them costs: the few tokens that much attention
        goes to are unlike the many, and it is their error that is seen in the loss. Maps count all tokens alike:
        they need far more numbers than a quantiser, and weighting them fits them to the text instead.
        """
        rows, gradient = rows[SINKS:].transpose(0, 1).float(), gradient[:, SINKS:]
        cost = gradient.square().sum(-1)
        cost = cost / cost.mean(1, keepdim=True).clamp(min=1e-30)
        cost = cost.clamp(max=MAX_COST)  # [G, T]
        self.moments[side].add(layer, rows)
        self.gradients[side][layer] += gradient.mT @ gradient / gradient.shape[1]
        weights = FIT_EVEN + (1 - FIT_EVEN) * cost
        picked = torch.multinomial(weights, self._per_window, replacement=True, generator=self._generator)
        self._samples[side][layer].append(rows.gather(1, picked[..., None].expand(-1, -1, rows.shape[-1])))

    def sampled(self, side: str) -> Tensor:
        """Rows to fit quantisers to, float32 [L, G, n, d], shuffled: tokens that matter more are there more often."""
        rows = torch.stack([torch.cat(layer, 1) for layer in self._samples[side]])
        return rows[:, :, torch.randperm(rows.shape[2], generator=self._generator)]
