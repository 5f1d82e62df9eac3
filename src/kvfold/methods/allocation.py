"""One budget for the whole model: how many bits each dimension of each head's keys and values gets.

Two levels, both greedy along lower convex hulls and so optimal up to the last step. Within a head, bits go where
they lower the expected loss most per bit. Between heads, what is chosen is the number of tokens per page, because
that is what a head really costs: a head is given all the bits that its share of the page has room for.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from kvfold.errors import ConfigError

WIDTHS = (0, 1, 2, 3, 4, 5, 6, 8, 16)
FLOOR = 1e-9  # of the mean loss: what dimensions count for that calibration saw no use of
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Allocation:
    """bits: width of each dimension, [heads, dims]; capacity: tokens per page, [heads]; loss: expected, summed."""

    bits: Ints
    capacity: Ints
    loss: float


def allocate(loss: Floats, bits: float, page_bytes: int, block: int) -> Allocation:
    """The widths with the least expected loss whose pages cost at most `bits` per element on average.

    loss: [heads, dims, len(WIDTHS)], expected loss of each dimension at each width; keys and values of a head are
    both among its dims. The cost counted is that of whole pages: page_bytes * 8 / capacity per token and head.
    Raises ConfigError where the budget is below what the smallest pages cost.
    """
    heads, dims, _ = loss.shape
    # A head without any loss (all its far keys lay behind a short window) still needs rows of some width.
    least = max(FLOOR * float(loss[..., 0].mean()), np.finfo(np.float32).tiny)
    loss = np.maximum(loss, least * np.exp2(-2.0 * np.array(WIDTHS)))
    ladders = [_ladder(head) for head in loss]
    # Candidate capacities: every number of blocks that changes the bits a token can have.
    blocks = np.arange(1, page_bytes // (block // 8) + 1)
    room = page_bytes * 8 // (blocks * block)
    keep = room >= max(1, dims // 16)
    blocks, room = blocks[keep], room[keep]
    cost = page_bytes * 8 / (blocks * block)
    options = np.stack([ladder.loss_within(room) for ladder in ladders])
    budget = bits * dims * heads
    if cost[-1] * heads > budget:
        raise ConfigError(f"bits={bits:g} is below what pages can hold; use at least {cost[-1] / dims:.2f}")
    choice = _choose(options[:, ::-1], cost[::-1], budget)
    choice = len(blocks) - 1 - choice
    chosen = np.stack([ladder.bits_within(int(room[c])) for ladder, c in zip(ladders, choice, strict=True)])
    total = float(options[np.arange(heads), choice].sum())
    return Allocation(chosen, blocks[choice] * block, total)


@dataclass(frozen=True)
class _Ladder:
    """A head's upgrades from 0 bits, best first: (dimension, new width), running cost and remaining loss."""

    dimension: Ints
    width: Ints
    cost: Ints  # cumulative bits, after each upgrade
    loss: Floats  # [upgrades + 1], before any and after each
    dims: int

    def loss_within(self, room: Ints) -> Floats:
        return self.loss[np.searchsorted(self.cost, room, side="right")]

    def bits_within(self, room: int) -> Ints:
        bits = np.zeros(self.dims, np.int64)
        taken = int(np.searchsorted(self.cost, room, side="right"))
        np.maximum.at(bits, self.dimension[:taken], self.width[:taken])
        return bits


def _ladder(loss: Floats) -> _Ladder:
    """loss: [dims, widths] of one head."""
    steps = []
    for dim, curve in enumerate(loss):
        hull = _lower_hull(np.array(WIDTHS, float), curve)
        for a, b in pairwise(hull):
            gain, bits = float(curve[a] - curve[b]), WIDTHS[b] - WIDTHS[a]
            steps.append((gain / bits, dim, WIDTHS[b], bits, gain))
    # On a hull the slopes of one dimension fall, so the order between dimensions keeps each one's own order.
    steps.sort(key=lambda s: (-s[0], s[1], s[2]))
    _, dimension, width, cost, gains = (np.array(column) for column in zip(*steps, strict=True))
    remaining = loss[:, 0].sum() - np.concatenate([[0.0], np.cumsum(gains)])
    return _Ladder(dimension, width, np.cumsum(cost), remaining, len(loss))


def _choose(loss: Floats, cost: Floats, budget: float) -> Ints:
    """One option per head. loss: [heads, options], cost: [options] ascending. Starts from the cheapest."""
    heads = len(loss)
    steps = []
    for head in range(heads):
        hull = _lower_hull(cost, loss[head])
        for a, b in pairwise(hull):
            extra = float(cost[b] - cost[a])
            steps.append((float(loss[head, a] - loss[head, b]) / extra, head, b, extra))
    steps.sort(key=lambda s: (-s[0], s[1], s[2]))
    choice = np.zeros(heads, np.int64)
    spent = cost[0] * heads
    closed: set[int] = set()
    for _, head, option, extra in steps:
        if head in closed:
            continue
        if spent + extra > budget * (1 + 1e-12):
            closed.add(head)  # a later, larger step of this head would not fit either
            continue
        choice[head] = option
        spent += extra
    return choice


def _lower_hull(x: Floats, y: Floats) -> list[int]:
    """Indices of the lower convex hull of a falling curve, ending at its least value."""
    hull: list[int] = []
    for i in range(int(np.argmin(y)) + 1):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(i)
    return hull
