"""Causal attention whose backward pass also tells how the loss depends on the *far* keys and values.

Far keys are those that a query would meet as sealed codes; near ones (sinks and recent tokens) are exact and so
must not count. The gradient with respect to the far use alone is what weighs a quantisation error.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 256  # queries per tile of the backward pass

Receive = Callable[[Tensor, Tensor], None]


def tapped_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, near_start: Tensor, sinks: int, receive: Receive
) -> Tensor:
    """Causal attention of one whole sequence, differentiable.

    q: [T, H, d]; k, v: [T, G, d]; near_start: int64 [T], position of the first recent key of each query.
    During the backward pass `receive(dk, dv)` is called once with the far gradients, float32 [G, T, d] each.
    Returns [T, H, d].
    """
    out: Tensor = _Tapped.apply(q, k, v, scale, window, near_start, sinks, receive)  # type: ignore[no-untyped-call]
    return out


class _Tapped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        near_start: Tensor,
        sinks: int,
        receive: Receive,
    ) -> Tensor:
        group = q.shape[1] // k.shape[1]
        queries, keys, values = (
            x.transpose(0, 1)[None] for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
        )
        mask = None
        if window is not None:
            position = torch.arange(q.shape[0])
            distance = position[:, None] - position
            mask = (distance >= 0) & (distance < window)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale)
        out = out[0].transpose(0, 1)
        ctx.save_for_backward(q, k, v, out, near_start)
        ctx.rest = scale, window, sinks, receive  # type: ignore[attr-defined]
        return out

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, near_start = ctx.saved_tensors  # type: ignore[attr-defined]
        scale, window, sinks, receive = ctx.rest  # type: ignore[attr-defined]
        tokens, heads, d = q.shape
        kv_heads = k.shape[1]
        by_group = [x.view(tokens, kv_heads, -1, d).permute(1, 2, 0, 3).float() for x in (q * scale, out, grads[0])]
        keys, values = (x.transpose(0, 1).float().contiguous() for x in (k, v))  # [G, T, d]
        dq = torch.empty_like(by_group[0])
        dk, dv, near_dk, near_dv = (torch.zeros_like(keys) for _ in range(4))
        for start, stop, first in _tiles(tokens, window):
            tq, to, tg = (x[:, :, start:stop].flatten(1, 2) for x in by_group)  # [G, g * rows, d]
            tk, tv = keys[:, first:stop], values[:, first:stop]
            mask, near = _masks(start, stop, first, window, near_start)
            scores = (tq @ tk.mT).unflatten(1, (-1, stop - start)).masked_fill_(~mask, float("-inf"))
            p = scores.softmax(-1).flatten(1, 2)
            ds = p * (tg @ tv.mT - (to * tg).sum(-1, keepdim=True))
            dq[:, :, start:stop] = (ds @ tk).unflatten(1, (-1, stop - start))
            dk[:, first:stop] += ds.mT @ tq
            dv[:, first:stop] += p.mT @ tg
            low = max(int(near_start[start]), first)  # no earlier key is near to any query of the tile
            near = near[:, low - first :]
            for total, weights, rows in ((near_dk, ds, tq), (near_dv, p, tg)):
                part = weights[..., low - first :].unflatten(1, (-1, stop - start)) * near
                total[:, low:stop] += part.flatten(1, 2).mT @ rows
        far_dk, far_dv = dk - near_dk, dv - near_dv
        far_dk[:, :sinks] = 0
        far_dv[:, :sinks] = 0
        receive(far_dk, far_dv)
        dq = (dq * scale).permute(2, 0, 1, 3).reshape(tokens, heads, d)
        return dq, dk.transpose(0, 1), dv.transpose(0, 1), None, None, None, None, None


def _tiles(tokens: int, window: int | None) -> Iterator[tuple[int, int, int]]:
    """Query tiles [start, stop) with the first key that any of them sees."""
    for start in range(0, tokens, TILE):
        yield start, min(start + TILE, tokens), 0 if window is None else max(0, start - window + 1)


def _masks(start: int, stop: int, first: int, window: int | None, near_start: Tensor) -> tuple[Tensor, Tensor]:
    """Which keys of [first, stop) the queries [start, stop) see, and which are recent, bool [rows, keys] each."""
    query, key = torch.arange(start, stop)[:, None], torch.arange(first, stop)
    mask = key <= query
    if window is not None:
        mask &= key > query - window
    return mask, mask & (key >= near_start[start:stop, None])
