"""From scores to the tokens that stay."""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from kvfold.kv.staged import StagedLayout
from kvfold.methods.held import HeldRows
from kvfold.methods.policy import Policy


def pooled(scores: Tensor, kernel: int, kind: str) -> Tensor:
    """Smoothed over neighbours, [layers, G, R]: the mean ("avg") or the largest ("max") of `kernel` tokens."""
    if kernel == 1:
        return scores
    pool = avg_pool1d if kind == "avg" else max_pool1d
    smoothed: Tensor = pool(scores, kernel, stride=1, padding=kernel // 2)
    return smoothed


def ranked(scores: Tensor) -> Tensor:
    """Indices along the last dimension, highest first, the older of equals first."""
    return scores.argsort(dim=-1, descending=True, stable=True)


def choose(policy: Policy, held: HeldRows, layout: StagedLayout) -> tuple[Tensor, Tensor]:
    """Which tokens stay, bool [layers, G, R], and their scores, in which tokens that no budget bounds have +inf."""
    if not policy.drops:
        return held.valid, torch.zeros(held.shape)
    budget = layout.keep(held.context)
    wanted = held.length if budget is None else budget
    scores = policy.scores(held).masked_fill(policy.protected(held, wanted), float("inf"))
    scores = _by_block(scores, held, layout).masked_fill(~held.valid, float("-inf"))
    counts = policy.counts(held, scores, wanted).maximum(scores.isposinf().sum(-1))
    order = ranked(scores)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[-1]).expand_as(order))
    keep = (rank < counts[..., None]) & held.valid
    return _whole_blocks(keep, held, layout), scores


def _by_block(scores: Tensor, held: HeldRows, layout: StagedLayout) -> Tensor:
    """Coded tokens that can only go together get the mean of their scores."""
    for layer, head, where, size in _bound(held, layout):
        own = scores[layer, head, where].view(-1, size)
        scores[layer, head, where] = own.mean(1, keepdim=True).expand_as(own).flatten()
    return scores


def _whole_blocks(keep: Tensor, held: HeldRows, layout: StagedLayout) -> Tensor:
    """Blocks of which not all tokens stay are dropped as a whole."""
    for layer, head, where, size in _bound(held, layout):
        own = keep[layer, head, where].view(-1, size)
        keep[layer, head, where] = own.all(1, keepdim=True).expand_as(own).flatten()
    return keep


def _bound(held: HeldRows, layout: StagedLayout) -> list[tuple[int, int, Tensor, int]]:
    """(layer, head, columns, block) of coded tokens whose blocks share scales."""
    found = []
    for layer, model_layer in enumerate(held.model_layers):
        for head in range(held.kv_heads):
            for track in range(1, layout.tracks):
                fmt = layout.format(track, model_layer, head)
                where = ((held.track[layer, head] == track) & held.valid[layer, head]).nonzero()[:, 0]
                if fmt.whole_blocks and len(where):
                    found.append((layer, head, where, fmt.block))
    return found
