"""Policies that give heads budgets of their own or change what stays, in plain loops; see naive_policies.py."""

import math

from tests.methods.naive_cache import NaiveCache
from tests.methods.naive_policies import Kept, Moment, Naive, best, heads_of, protected, smoothed, window_scores

PAGE = 32


def kvcompress(cache: NaiveCache, now: Moment) -> Kept:
    """Squared attention from the last 32 queries before each event, added up over events; tokens of all layers and
    heads in one order, then whole pages (the 64 protected tokens are two). Sinks are not kept, as in the paper."""
    queries = [t for event in events_of(now) for t in range(max(0, event - 32), event)]
    queries = sorted(set(queries))
    scores, always = {}, {}
    for at in heads_of(cache):
        held = cache.held[at[0]][at[1]]
        scores[at] = window_scores(cache, at, queries, 64, 7, "max", power=2)
        always[at] = protected(held, 0, 64)
    everything = [(at, p) for at in scores for p in scores[at]]
    everything.sort(key=lambda t: (t[1] not in always[t[0]], -scores[t[0]][t[1]] if t[1] not in always[t[0]] else 0))
    total = len(scores) * now.budget
    chosen = everything[:total]
    wanted = {at: sum(a == at for a, _ in chosen) for at in scores}
    counts = {at: n if n == len(scores[at]) else n // PAGE * PAGE for at, n in wanted.items()}
    left = total - sum(counts.values())
    for at in sorted(scores, key=lambda at: -(wanted[at] - counts[at])):
        more = min(PAGE, len(scores[at]) - counts[at])
        if more <= left:
            counts[at] += more
            left -= more
    return {at: best(scores[at], always[at], counts[at]) for at in scores}


def events_of(now: Moment, every: int = 32) -> list[int]:
    """All events up to now of a method without events inside the prompt."""
    return list(range(now.context, now.length + 1, every))


def ems(cache: NaiveCache, now: Moment) -> Kept:
    """Scores are means over the queries that could see a token and over the group's heads. What stays changes."""
    kept: Kept = {}
    for layer, head in heads_of(cache):
        held = cache.held[layer][head]
        everything = cache.received(layer, head, list(range(now.length)))
        local = cache.received(layer, head, now.last(32))
        worth = {}
        for p in held:
            able, near = (int(cache.seen[layer][head][q, p].sum()) for q in (slice(now.length), now.last(32)))
            worth[p] = everything[p] / (able * cache.group) + local[p] / (max(near, 1) * cache.group)
        quiet = worth | dict.fromkeys(held[len(held) - 32 :], 0.0)
        kept[layer, head] = best(smoothed(held, quiet, 7, "avg"), protected(held, 4, 32), now.budget)
        merge(cache, layer, head, kept[layer, head], worth)
    return kept


def merge(cache: NaiveCache, layer: int, head: int, stay: list[int], worth: dict[int, float]) -> None:
    keys, values = cache.keys[layer][:, head], cache.values[layer][:, head]
    joined: dict[int, list[int]] = {p: [p] for p in stay}
    for p in cache.held[layer][head]:
        if p in joined:
            continue
        cosines = [float(keys[p] @ keys[s] / keys[p].norm() / keys[s].norm()) for s in stay]
        most = max(cosines)
        if most >= 0.6:
            joined[stay[cosines.index(most)]].append(p)
    for rows in (keys, values):
        new = {}
        for goal, members in joined.items():
            if len(members) > 1:
                weight = sum(worth[p] for p in members)
                new[goal] = sum((worth[p] * rows[p] for p in members), 0 * rows[0]) / weight
        for goal, row in new.items():
            rows[goal] = row


def dbudgetkv(rank: str, threshold: float) -> Naive:
    def choose(cache: NaiveCache, now: Moment) -> Kept:
        kept: Kept = {}
        for layer, head in heads_of(cache):
            held = cache.held[layer][head]
            squares = cache.received(layer, head, now.last(32), power=2)
            always = protected(held, 4, 32)
            loose = [p for p in held if p not in always]
            # The worst first: far from the end, or attended to least.
            loose.sort(key=lambda p: p if rank == "position" else (squares[p], -p))
            norm = math.sqrt(sum(squares.values()))
            stay = list(held)
            for p in loose:
                rest = sum(squares[s] for s in stay if s != p)
                if math.sqrt(rest) < (1 - threshold) * norm:
                    break
                stay.remove(p)
            kept[layer, head] = stay
        return kept

    return choose
