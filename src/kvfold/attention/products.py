"""Scores and weighted sums over rows stored in several formats and coordinates, joined in one softmax."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvfold.attention.homomorphic import Codes, code_sides
from kvfold.kv.format import PageFormat
from kvfold.kv.frame import Basis
from kvfold.kv.packing import decode

MAX_SCORES = 2**24  # float32 scores held at once; more queries than that are worked off in tiles


@dataclass(frozen=True)
class Stored:
    """Rows that queries of N sequences and some heads meet together.

    keys, values: float32 [N, heads, kept, rows], in the coordinates of `bases` (one per sequence; None: the
    model's own). mask: which rows each query sees, broadcast to [N, heads, Lq, rows].
    """

    keys: Tensor
    values: Tensor
    mask: Tensor
    bases: Sequence[Basis | None]
    layer: int
    heads: Tensor

    @classmethod
    def plain(cls, keys: Tensor, values: Tensor, mask: Tensor) -> "Stored":
        """Rows in the model's own coordinates. Values that no query sees are set to 0."""
        return cls(keys, _seen(values, mask), mask, [None] * len(keys), 0, torch.arange(keys.shape[1]))

    @property
    def rows(self) -> int:
        return self.keys.shape[-1]

    def tile(self, queries: slice | Tensor) -> "Stored":
        """For some of the queries only."""
        return self if self.mask.shape[-2] == 1 else replace(self, mask=self.mask[..., queries, :])

    def scores(self, q: Tensor) -> Tensor:
        """q: [N, heads, n, d] scaled. Returns [N, heads, n, rows]."""
        turned, bias = q, None
        if any(b is not None and b.key is not None for b in self.bases):
            turned = torch.stack([self._turned(own, basis) for own, basis in zip(q, self.bases, strict=True)])
            bias = self._bias(q)
        scores = turned[..., : self.keys.shape[2]] @ self.keys
        return scores if bias is None else scores + bias[..., None]

    def weighted(self, weights: Tensor, out: Tensor) -> None:
        """Adds the weighted sum of the values to out [N, heads, n, d]. weights: [N, heads, n, rows]."""
        lifted = weights @ self.values.mT
        for i, basis in enumerate(self.bases):
            frame = None if basis is None else basis.value
            if frame is None:
                out[i, ..., : lifted.shape[-1]] += lifted[i]
                continue
            out[i] += frame.lift(self.layer, self.heads, lifted[i])
            if frame.origin is not None:
                out[i] += weights[i].sum(-1, keepdim=True) * frame.origin[self.layer, self.heads].float()[:, None]

    def _turned(self, q: Tensor, basis: Basis | None) -> Tensor:
        frame = None if basis is None else basis.key
        return q if frame is None else frame.turn(self.layer, self.heads, q)

    def _bias(self, q: Tensor) -> Tensor | None:
        """What the origins of the keys add to all scores of a query, [N, heads, n]."""
        origins = [b.key.origin if b is not None and b.key is not None else None for b in self.bases]
        if all(origin is None for origin in origins):
            return None
        zero = torch.zeros(self.keys.shape[1], q.shape[-1])
        chosen = [zero if o is None else o[self.layer, self.heads].float() for o in origins]
        return (q @ torch.stack(chosen)[..., None])[..., 0]


@dataclass(frozen=True)
class StoredCodes:
    """The same for rows whose format stores sums: products are of codes. Fields as in `Stored`."""

    keys: Codes
    values: Codes
    mask: Tensor
    rows: int

    def tile(self, queries: slice | Tensor) -> "StoredCodes":
        return self if self.mask.shape[-2] == 1 else replace(self, mask=self.mask[..., queries, :])

    def scores(self, q: Tensor) -> Tensor:
        scores: Tensor = self.keys.scores(q.flatten(0, 1)).unflatten(0, q.shape[:2])
        return scores

    def weighted(self, weights: Tensor, out: Tensor) -> None:
        out += self.values.weighted(weights.flatten(0, 1)).unflatten(0, weights.shape[:2])


AnyStored = Stored | StoredCodes


def stored_rows(
    fmt: PageFormat,
    blocks: Tensor,
    shape: tuple[int, int],
    mask: Tensor,
    bases: Sequence[Basis | None],
    layer: int,
    heads: Tensor,
) -> AnyStored:
    """What blocks uint8 [N * heads, B, block_bytes] of N sequences and some heads (`shape`) hold."""
    if fmt.key.sums and fmt.value.sums:
        return StoredCodes(*code_sides(fmt, blocks), mask, blocks.shape[1] * fmt.block)
    keys, values = (x.view(*shape, *x.shape[1:]) for x in decode(fmt, blocks))
    return Stored(keys, _seen(values, mask), mask, bases, layer, heads)


def _seen(values: Tensor, mask: Tensor) -> Tensor:
    """Rows that nobody wrote may hold NaN, and 0 x NaN is NaN; keys are covered by the scores' mask."""
    return values.masked_fill_(~mask.any(2)[:, :, None], 0)


@dataclass(frozen=True)
class Merged:
    """out: [N, heads, g, Lq, d]; lse: [N, heads, g, Lq]; weights: per part those of the watched queries [N, heads, g,
    W, rows], if any."""

    out: Tensor
    lse: Tensor
    weights: list[Tensor]


def merged(q: Tensor, parts: Sequence[AnyStored], watched: Tensor | None = None) -> Merged:
    """Softmax attention of q [N, heads, g, Lq, d] (scaled) over all parts. watched: queries whose weights are wanted,
    int64 [W]."""
    n, heads, group, lq, _ = q.shape
    plain = [part for part in parts if isinstance(part, Stored) and all(basis is None for basis in part.bases)]
    count = 0 if watched is None else len(watched)
    if lq > 1 and 2 * count < lq and len(plain) == len(parts):
        result = _fused(q, plain)
        if watched is None or not count:
            return result
        # The fused kernel keeps the weights to itself: a few queries are worked off once more.
        again = merged(q[..., watched, :], [part.tile(watched) for part in plain], torch.arange(count))
        return replace(result, weights=again.weights)
    flat = q.flatten(2, 3)
    scores = torch.cat([part.scores(flat) for part in parts], -1).unflatten(2, (group, lq))
    sizes = [part.rows for part in parts]
    mask = torch.cat([part.mask.expand(n, heads, lq, part.rows) for part in parts], -1)
    scores.masked_fill_(~mask[:, :, None], float("-inf"))
    lse = scores.logsumexp(-1)
    shares = (scores - lse[..., None]).exp_().split(sizes, -1)
    out = torch.zeros_like(flat)
    for part, share in zip(parts, shares, strict=True):
        part.weighted(share.flatten(2, 3), out)
    weights = [share if count == lq else share[..., watched, :] for share in shares] if count else []
    return Merged(out.view_as(q), lse, weights)


def _fused(q: Tensor, parts: Sequence[Stored]) -> Merged:
    """The same by torch's fused kernel, which never holds all scores: several times faster for many queries."""
    n, heads, group, lq, d = q.shape
    most = max(part.mask.shape[1] for part in parts)  # 1 where all heads see the same
    mask = torch.cat([part.mask.expand(n, most, lq, part.rows) for part in parts], -1)
    keys, values = (
        torch.cat([pad(x, (0, 0, 0, d - x.shape[2])) for x in side], -1).mT.contiguous()
        for side in ([part.keys for part in parts], [part.values for part in parts])
    )
    keys.masked_fill_(~mask.any(2)[..., None], 0)  # here the mask is added, and NaN - inf is NaN
    bias = torch.zeros(mask.shape).masked_fill_(~mask, float("-inf")).expand(n, heads, lq, -1).flatten(0, 1)[:, None]
    # A KV head counts as a batch, whose query heads share keys and values without a copy.
    keys, values = (x.flatten(0, 1)[:, None].expand(-1, group, -1, -1) for x in (keys, values))
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the public function keeps the lse to itself
    out, lse = attend(q.flatten(0, 1), keys, values, 0.0, False, attn_mask=bias, scale=1.0)
    return Merged(out.view_as(q), lse.view(n, heads, group, lq), [])
