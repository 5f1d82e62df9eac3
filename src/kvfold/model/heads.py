"""Queries, keys and values from one projection: QK norm, RoPE and the maps of a method."""

from typing import Protocol

import torch
from torch import Tensor

from kvfold.model.elementwise import HeadNorm
from kvfold.model.linear import Projections
from kvfold.model.rope import Rotation, rotate

QKV = tuple[Tensor, Tensor, Tensor]


class SplitHeads(Protocol):
    def __call__(
        self, qkv: Tensor, heads: int, weights: Projections, norm: HeadNorm | None, by: Rotation | None
    ) -> QKV:
        """qkv [T, H + 2 G, d] (which may be overwritten) as q [T, H, d], k and v [T, G, d], ready for attention."""
        ...


def split_heads(qkv: Tensor, heads: int, weights: Projections, norm: HeadNorm | None, by: Rotation | None) -> QKV:
    """`SplitHeads` in torch, differentiable."""
    end = heads + (qkv.shape[1] - heads) // 2
    qk, v = qkv[:, :end], qkv[:, end:]
    if norm is not None:
        qk = norm(qk)
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


def views(qkv: Tensor, heads: int) -> QKV:
    """qkv [T, H + 2 G, d] cut into q, k and v."""
    end = heads + (qkv.shape[1] - heads) // 2
    return qkv[:, :heads], qkv[:, heads:end], qkv[:, end:]


def _map_heads(x: Tensor, maps: Tensor) -> Tensor:
    """Apply maps [G, d, d] to x [T, n, d] whose heads come in G equal groups: one batched product."""
    tokens, heads, dim = x.shape
    groups = maps.shape[0]
    by_group = x.reshape(tokens, groups, -1, dim).transpose(0, 1).reshape(groups, -1, dim)
    mapped = torch.bmm(by_group, maps)
    return mapped.view(groups, tokens, -1, dim).transpose(0, 1).reshape(tokens, heads, dim)
