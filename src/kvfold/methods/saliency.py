"""Normalised attention (ZipCache, arXiv 2405.14256): how much a token is attended to by those who could."""

from torch import Tensor

from kvfold.kv.staged import Watch
from kvfold.methods.choice import ranked
from kvfold.methods.held import HeldRows

LAST, RANDOM = 0.05, 0.05  # share of the prompt whose queries are probes: its end, and picked at random
RECEIVED = Watch(LAST, probes=RANDOM)
ABLE = Watch(LAST, probes=RANDOM, power=0)
WATCHES = (RECEIVED, ABLE)


def saliency(held: HeldRows) -> Tensor:
    """Attention from the probes divided by the number of probes at or after the token, [layers, G, R]."""
    return held.mass(RECEIVED) / held.mass(ABLE).clamp(min=1)


def by_saliency(held: HeldRows, fresh: Tensor, share: float) -> Tensor:
    """Class 1 for the most salient `share` of each head's tokens in `fresh`, class 2 for the others, [layers, G, R]."""
    order = ranked(saliency(held).masked_fill(~fresh, float("-inf")))
    salient = order.argsort(-1) < (share * fresh.sum(-1, keepdim=True)).round()
    return 2 - salient.long()
