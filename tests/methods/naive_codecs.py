"""Quantisers as their papers have them, number by number. Rows are [tokens, channels]; all give back what is read."""

from torch import Tensor


def rounded(x: Tensor, bits: int) -> Tensor:
    """Numbers that share an offset and a step, both stored in 16 bits."""
    low = x.min().half().double()
    step = ((x.max() - x.min()) / (2**bits - 1)).half().double().clamp(min=1e-12)
    return ((x - low) / step).round().clamp(0, 2**bits - 1) * step + low


def per_token(x: Tensor, bits: int, group: int) -> Tensor:
    out = x.double().clone()
    for t in range(len(x)):
        for c in range(0, x.shape[1], group):
            out[t, c : c + group] = rounded(out[t, c : c + group], bits)
    return out


def per_channel(x: Tensor, bits: int, group: int) -> Tensor:
    """group: tokens that share a scale; they come in whole groups."""
    out = x.double().clone()
    for t in range(0, len(x), group):
        for c in range(x.shape[1]):
            out[t : t + group, c] = rounded(out[t : t + group, c], bits)
    return out


def probes(context: int) -> list[int]:
    """ZipCache's probe tokens: the last 5 % and a pseudo-random 5 % (Knuth's multiplicative hash of the position)."""
    last = context - max(1, round(0.05 * context))
    return [p for p in range(context) if p >= last or p * 2654435761 % 2**32 < 0.05 * 2**32]


def salient(attention: Tensor, tokens: list[int], share: float) -> set[int]:
    """The `share` of some tokens that probes attend to most, on average over those that come after them or are them.

    attention: [queries, g, keys] of one KV head.
    """
    asked = probes(len(attention))
    score = {}
    for p in tokens:
        able = [t for t in asked if t >= p]
        score[p] = float(attention[able, :, p].mean(1).sum()) / len(able) if able else 0.0
    order = sorted(tokens, key=lambda p: (-score[p], p))
    return set(order[: round(share * len(tokens))])


def channels(queries: Tensor, keys: Tensor, keep: int) -> list[int]:
    """ThinK's: mean q^2 of the last 32 queries [T, g, d] (all heads of the group) x mean k^2 over tokens [T, d]."""
    worth = {c: float((queries[-32:, :, c] ** 2).mean() * (keys[:, c] ** 2).mean()) for c in range(keys.shape[1])}
    return sorted(sorted(worth, key=lambda c: -worth[c])[:keep])
