"""KV-Compress (arXiv 2410.00161): whole pages, chosen over all layers and heads of a sequence, while it runs."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvfold.kv.staged import Watch
from kvfold.methods.base import PAGE_TOKENS, Facts
from kvfold.methods.choice import ranked
from kvfold.methods.held import HeldRows
from kvfold.methods.snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class KVCompress(SnapKV):
    """`kvcompress(budget=1024)`: score = squared attention from the last `window` prompt queries, summed over the
    group, smoothed, and added up further while decoding. All tokens of a sequence are ranked together, over layers
    and heads; what stays is a whole number of pages' worth (32 tokens) in every head, after the protected tokens.

    Deviations: pages are emptied by moving the tokens that stay together, not where they lie; sinks stay.
    """

    recent: int = 64
    kernel: int = 7
    pool: str = "max"

    name: ClassVar[str] = "kvcompress"
    facts: ClassVar[Facts] = Facts(
        "tokens, layers and heads unequally, in whole pages", "2410.00161", "group sums before smoothing, sinks stay"
    )

    @property
    def watches(self) -> tuple[Watch, ...]:
        return (Watch(self.window, power=2, renewed=False),)

    @property
    def uneven(self) -> bool:
        return True

    def counts(self, held: HeldRows, scores: Tensor, budget: int) -> Tensor:
        layers, heads, _ = held.shape
        best = ranked(scores.flatten())[: layers * heads * budget]
        chosen = scores.new_zeros(scores.numel()).scatter_(0, best, 1.0).view(held.shape).sum(-1).long()
        return _whole_pages(chosen, held.counts, scores.isposinf().sum(-1), layers * heads * budget)


def _whole_pages(chosen: Tensor, counts: Tensor, least: Tensor, total: int) -> Tensor:
    """Counts rounded to whole pages where there is room for that beside the `least` that each head keeps; no head
    keeps more than it has and all together no more than `total`."""
    full = (chosen // PAGE_TOKENS * PAGE_TOKENS).maximum(least)
    kept = torch.where(chosen == counts, chosen, full).flatten()
    # What rounding left over goes, a page at a time, to the heads that lost most by it.
    order = ranked(chosen.flatten() - kept).tolist()
    left = total - int(kept.sum())
    for head in order:
        more = min(PAGE_TOKENS - int(kept[head]) % PAGE_TOKENS, int(counts.flatten()[head] - kept[head]))
        if 0 < more <= left:
            kept[head] += more
            left -= more
    return kept.view_as(chosen)
