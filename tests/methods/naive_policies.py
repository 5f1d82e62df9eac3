"""The token policies as their papers have them, in plain loops over the tokens of a `NaiveCache`.

Each takes a cache, the number of tokens read, the length at the last event (0: none) and the budget, and gives the
positions that stay, per layer and head. The deviations that the docstrings of kvfold.methods state are made here too:
weights are summed over a group's query heads, `sinks` first and `recent` newest tokens stay, ties go to the older.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.methods.naive_cache import NaiveCache

Kept = dict[tuple[int, int], list[int]]
Scores = dict[int, float]


@dataclass(frozen=True)
class Moment:
    """An event: `length` tokens are read, the last event was at `before`, `budget` tokens are to stay per head."""

    length: int
    before: int
    budget: int
    context: int

    def last(self, window: int) -> list[int]:
        """The newest queries since the last event, no more than `window`."""
        return list(range(max(self.before, self.length - window), self.length))


Naive = Callable[[NaiveCache, Moment], Kept]


def full_layers(cache: NaiveCache) -> list[int]:
    return [i for i, window in enumerate(cache.windows) if window is None]


def heads_of(cache: NaiveCache) -> list[tuple[int, int]]:
    return [(layer, head) for layer in full_layers(cache) for head in range(cache.kv_heads)]


def protected(held: list[int], sinks: int, recent: int) -> set[int]:
    return set(held[:sinks]) | set(held[len(held) - recent :] if recent else [])


def best(scores: Scores, always: set[int], count: int) -> list[int]:
    """The `count` tokens that stay: those that always do, then by score, the older of equals first."""
    order = sorted(scores, key=lambda p: (p not in always, -scores[p] if p not in always else 0.0, p))
    return sorted(order[:count])


def smoothed(held: list[int], scores: Scores, kernel: int, kind: str) -> Scores:
    """Over neighbours among the held tokens; beyond the ends there is nothing (0 for a mean)."""
    half, found = kernel // 2, {}
    for i, p in enumerate(held):
        near = [scores[held[j]] for j in range(i - half, i + half + 1) if 0 <= j < len(held)]
        found[p] = sum(near) / kernel if kind == "avg" else max(near)
    return found


def window_scores(
    cache: NaiveCache, at: tuple[int, int], queries: list[int], recent: int, kernel: int, kind: str, power: int = 1
) -> Scores:
    held = cache.held[at[0]][at[1]]
    scores = cache.received(*at, queries, power)
    scores |= dict.fromkeys(held[len(held) - recent :], 0.0)
    return smoothed(held, scores, kernel, kind)


def snapkv(cache: NaiveCache, now: Moment) -> Kept:
    kept: Kept = {}
    for at in heads_of(cache):
        scores = window_scores(cache, at, now.last(32), 32, 5, "avg")
        kept[at] = best(scores, protected(cache.held[at[0]][at[1]], 4, 32), now.budget)
    return kept


def pyramidkv(cache: NaiveCache, now: Moment) -> Kept:
    layers = full_layers(cache)
    always = 4 + 32
    longest = max(len(cache.held[layer][head]) for layer, head in heads_of(cache))
    free = now.budget - always
    smallest = free / 20
    largest = min(2 * free - smallest, longest - always)
    if largest < free:  # there is room for all
        largest = free
    smallest = 2 * free - largest
    kept: Kept = {}
    given = 0
    for i, layer in enumerate(layers):
        # A straight line from the largest to the smallest, rounded so that the sum stays what it should be.
        line = [largest + (smallest - largest) * j / (len(layers) - 1) for j in range(i + 1)]
        count = round(sum(line)) - given
        given += count
        for head in range(cache.kv_heads):
            scores = window_scores(cache, (layer, head), now.last(32), 32, 5, "avg")
            kept[layer, head] = best(scores, protected(cache.held[layer][head], 4, 32), always + count)
    return kept


def adakv(cache: NaiveCache, now: Moment) -> Kept:
    kept: Kept = {}
    for layer in full_layers(cache):
        scores, always = {}, {}
        for head in range(cache.kv_heads):
            scores[head] = window_scores(cache, (layer, head), now.last(32), 32, 7, "max")
            always[head] = protected(cache.held[layer][head], 4, 32)
        everything = [(h, p) for h in scores for p in scores[h]]
        everything.sort(key=lambda t: (t[1] not in always[t[0]], -scores[t[0]][t[1]] * (t[1] not in always[t[0]])))
        chosen = everything[: cache.kv_heads * now.budget]
        counts = [
            math.floor(0.8 * sum(h == head for h, _ in chosen) + 0.2 * now.budget + 1e-6)
            for head in range(cache.kv_heads)
        ]
        left = cache.kv_heads * now.budget - sum(counts)
        for head in range(cache.kv_heads):
            kept[layer, head] = best(scores[head], always[head], counts[head] + (head < left))
    return kept


def h2o(cache: NaiveCache, now: Moment) -> Kept:
    kept: Kept = {}
    for layer, head in heads_of(cache):
        held = cache.held[layer][head]
        scores = cache.received(layer, head, list(range(now.length)))
        kept[layer, head] = best(scores, set(held[len(held) - (now.budget - now.budget // 2) :]), now.budget)
    return kept


def tova(cache: NaiveCache, now: Moment) -> Kept:
    kept: Kept = {}
    for layer in full_layers(cache):
        last = [cache.received(layer, head, [now.length - 1]) for head in range(cache.kv_heads)]
        mean = {p: sum(own[p] for own in last) / cache.kv_heads / cache.group for p in last[0]}
        for head in range(cache.kv_heads):
            kept[layer, head] = best(mean, {now.length - 1}, now.budget)
    return kept


def keydiff(cache: NaiveCache, now: Moment) -> Kept:
    kept: Kept = {}
    for layer, head in heads_of(cache):
        held = cache.held[layer][head]
        unit = {p: cache.keys[layer][p, head] / cache.keys[layer][p, head].norm() for p in held}
        anchor = sum(unit.values(), torch.zeros(cache.dims, dtype=torch.float64)) / len(held)
        scores = {p: -float(unit[p] @ anchor / anchor.norm()) for p in held}
        kept[layer, head] = best(scores, protected(held, 4, 32), now.budget)
    return kept


def expected(turns: list[Callable[[int], Tensor] | None]) -> Naive:
    """turns: per layer the matrix by which RoPE turns a query at a position (None: not at all)."""

    def choose(cache: NaiveCache, now: Moment) -> Kept:
        kept: Kept = {}
        for layer, head in heads_of(cache):
            turn, held = turns[layer], cache.held[layer][head]
            mixed = torch.eye(cache.dims, dtype=torch.float64)
            if turn is not None:
                mixed = torch.stack([turn(now.length + i) for i in range(512)]).mean(0)
            total = dict.fromkeys(held, 0.0)
            for i in range(cache.group):
                rows = cache.queries[layer][4 : now.length, head * cache.group + i]
                if turn is not None:  # what they were before RoPE
                    rows = torch.stack([turn(4 + t).T @ row for t, row in enumerate(rows)])
                mean = rows.mean(0)
                spread = (rows - mean).T @ (rows - mean) / len(rows)
                mean, spread = mixed @ mean, mixed @ spread @ mixed.T
                logits = []
                for p in held:
                    key = cache.keys[layer][p, head]
                    logits.append(key @ mean * cache.dims**-0.5 + key @ spread @ key / (2 * cache.dims))
                others = torch.tensor([p >= 4 for p in held])  # the sinks are left out before normalising
                shares = torch.stack(logits).masked_fill(~others, float("-inf")).softmax(0)
                for p, share in zip(held, shares.tolist(), strict=True):
                    total[p] += share / cache.group
            scores = {p: total[p] * float(cache.values[layer][p, head].norm()) for p in held}
            kept[layer, head] = best(scores, protected(held, 4, 32), now.budget)
        return kept

    return choose
