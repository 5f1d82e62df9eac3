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
            rows = stop - start
            tq, to, tg = (x[:, :, start:stop].flatten(1, 2) for x in by_group)  # [G, g * rows, d]
            tk, tv = keys[:, first:stop], values[:, first:stop]
            scores = (tq @ tk.mT).unflatten(1, (-1, rows))  # [G, g, rows, keys]
            _mask(scores, start, first, window)
            p = scores.softmax(-1).flatten(1, 2)
            ds = (tg @ tv.mT).sub_((to * tg).sum(-1, keepdim=True)).mul_(p)
            dq[:, :, start:stop] = (ds @ tk).unflatten(1, (-1, rows))
            dk[:, first:stop].baddbmm_(ds.mT, tq)
            dv[:, first:stop].baddbmm_(p.mT, tg)
            low = max(int(near_start[start]), first)  # no earlier key is near to any query of the tile
            near = torch.arange(low, stop) >= near_start[start:stop, None]
            for total, weights, by in ((near_dk, ds, tq), (near_dv, p, tg)):
                part = weights[..., low - first :].unflatten(1, (-1, rows)) * near
                total[:, low:stop].baddbmm_(part.flatten(1, 2).mT, by)
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


def _mask(scores: Tensor, start: int, first: int, window: int | None) -> None:
    """Hides in scores [..., rows, keys] what the queries from `start` on do not see of the keys from `first` on."""
    rows, keys = scores.shape[-2:]
    diagonal = scores[..., start - first :]  # earlier keys come before every query of the tile
    diagonal.masked_fill_(torch.ones(rows, rows, dtype=torch.bool).triu(1), float("-inf"))
    if window is not None:
        distance = torch.arange(start, start + rows)[:, None] - torch.arange(first, first + keys)
        scores.masked_fill_(distance >= window, float("-inf"))
