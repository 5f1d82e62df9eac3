"""Expected attention (arXiv 2510.00636): how much future queries will attend to a key, from what queries look like."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvfold.errors import ConfigError
from kvfold.kv.staged_tables import QueryRecord
from kvfold.methods.base import CacheShape, Facts
from kvfold.methods.held import HeldRows
from kvfold.methods.policy import Policy

Frequencies = tuple[tuple[float, ...] | None, ...]
SKIPPED = 4  # first queries, unlike all others


@dataclass
class QueryMoments:
    """Sums over queries with RoPE taken back, and how many they were, float32: total [layers, H, d], products of two
    dimensions [layers, H, d (d + 1) / 2], each pair once.

    frequencies: RoPE's inverse frequencies of each layer, half as many as dimensions are rotated.
    """

    total: Tensor
    products: Tensor
    count: Tensor
    frequencies: Frequencies

    @classmethod
    def zeros(cls, shape: CacheShape) -> "QueryMoments":
        heads, d = (shape.layers, shape.heads), shape.head_dim
        return cls(
            torch.zeros(*heads, d), torch.zeros(*heads, d * (d + 1) // 2), torch.zeros(shape.layers), shape.frequencies
        )

    def add(self, layer: int, q: Tensor, first: int, event: int) -> None:
        positions = torch.arange(first, first + len(q))
        q = rotated(q, -positions, self.frequencies[layer])[max(0, SKIPPED - first) :].transpose(0, 1)
        self.total[layer] += q.sum(1)
        self.products[layer] += (q.mT @ q)[:, *torch.triu_indices(q.shape[-1], q.shape[-1])]
        self.count[layer] += q.shape[1]

    def moments(self, layer: int) -> tuple[Tensor, Tensor]:
        """Mean and covariance, [H, d] and [H, d, d]."""
        count, d = self.count[layer].clamp(min=1), self.total.shape[-1]
        mean = self.total[layer] / count
        square = mean.new_empty(*mean.shape, d)
        rows, columns = torch.triu_indices(d, d)
        square[:, rows, columns] = square[:, columns, rows] = self.products[layer] / count
        return mean, square - mean[..., :, None] * mean[..., None, :]

    def copy(self) -> "QueryMoments":
        return QueryMoments(self.total.clone(), self.products.clone(), self.count.clone(), self.frequencies)

    @property
    def state(self) -> Mapping[str, Tensor]:
        return {"total": self.total, "products": self.products, "count": self.count}

    @property
    def nbytes(self) -> int:
        return self.total.nbytes + self.products.nbytes + self.count.nbytes


@dataclass(frozen=True, kw_only=True)
class Expected(Policy):
    """`expected(budget=1024)`: with queries before RoPE distributed as N(mu, Sigma), and R the mean rotation of the
    next `future` positions, score = exp(q . k / sqrt(d) + k^T C k / (2 d)) with q = R mu and C = R Sigma R^T,
    normalised over all keys but the sinks' (a query head that looks at little else counts as much as the others then),
    averaged over a group's query heads, times the norm of the value.

    Deviations: mean and covariance are of all queries since the start, the first four left out, the covariance
    being the same for all future positions; the score of the newest `recent` tokens is not computed.
    """

    future: int = 512

    name: ClassVar[str] = "expected"
    facts: ClassVar[Facts] = Facts("tokens", "2510.00636", "recent tokens stay")
    scores_from: ClassVar[str] = "queries, keys, values"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.future < 1:
            raise ConfigError(f"expected future={self.future} is out of range; choose at least 1 position")

    def records(self, shape: CacheShape) -> Mapping[str, Callable[[], QueryRecord]]:
        return {self.name: lambda: QueryMoments.zeros(shape)}

    def scores(self, held: HeldRows) -> Tensor:
        moments = held.record(self.name)
        assert isinstance(moments, QueryMoments)
        found = torch.zeros(held.shape)
        for layer, model_layer in enumerate(held.model_layers):
            keys, values = held.rows(layer)
            mean, covariance = moments.moments(model_layer)
            frequencies = moments.frequencies[model_layer]
            ahead = torch.arange(held.length, held.length + self.future)
            turn = rotation_matrix(ahead, frequencies, keys.shape[-1])
            d, heads = keys.shape[-1], held.kv_heads
            mean = (mean @ turn.T).unflatten(0, (heads, -1))  # [G, g, d]
            covariance = (turn @ covariance @ turn.T).unflatten(0, (heads, -1))
            linear = torch.einsum("jgd,jrd->jgr", mean, keys) / math.sqrt(d)
            square = torch.einsum("jrd,jgde,jre->jgr", keys, covariance, keys) / (2 * d)
            others = (held.valid & ~held.first(self.sinks))[layer]
            logits = (linear + square).masked_fill(~others[:, None], float("-inf"))
            found[layer] = logits.softmax(-1).mean(1) * values.norm(dim=-1)
        return found


def rotated(x: Tensor, positions: Tensor, frequencies: tuple[float, ...] | None) -> Tensor:
    """x [n, H, d] turned by RoPE to `positions` [n] (negative: back)."""
    if frequencies is None:
        return x
    half = len(frequencies)
    angle = positions[:, None].double() * torch.tensor(frequencies, dtype=torch.float64)
    cos, sin = angle.cos().float()[:, None], angle.sin().float()[:, None]
    first, second = x[..., :half], x[..., half : 2 * half]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, x[..., 2 * half :]], -1)


def rotation_matrix(positions: Tensor, frequencies: tuple[float, ...] | None, dims: int) -> Tensor:
    """The mean over `positions` of the matrices by which RoPE turns a query, float32 [d, d]."""
    matrix = torch.eye(dims)
    if frequencies is None:
        return matrix
    half = len(frequencies)
    angle = positions[:, None].double() * torch.tensor(frequencies, dtype=torch.float64)
    cos, sin = angle.cos().mean(0).float(), angle.sin().mean(0).float()
    index = torch.arange(half)
    matrix[index, index] = matrix[index + half, index + half] = cos
    matrix[index, index + half], matrix[index + half, index] = -sin, sin
    return matrix
