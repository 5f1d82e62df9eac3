import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvfold.errors import ConfigError
from kvfold.kv.format import PageFormat, Row, Segment
from kvfold.methods.allocation import WIDTHS, allocate

Floats = NDArray[np.float64]
PAGE_BYTES, BLOCK, HEAD_DIM = 1024, 16, 8
SEEDS = st.integers(0, 10**6)


def random_loss(seed: int, heads: int, dims: int) -> Floats:
    """Falling curves of very different heights, not convex in general, [heads, dims, widths]."""
    random = np.random.default_rng(seed)
    height = np.exp(random.normal(0, 3, (heads, dims, 1)))
    noise = np.exp(random.normal(0, 0.3, (heads, dims, len(WIDTHS))))
    loss: Floats = np.minimum.accumulate(height * noise * 4.0 ** -np.array(WIDTHS), -1)
    return loss


def row_of(widths: NDArray[np.int64]) -> Row:
    ordered = sorted((int(w) for w in widths if w), reverse=True)
    return Row(tuple(Segment(width, len(list(run))) for width, run in itertools.groupby(ordered)))


@given(SEEDS, st.integers(1, 4), st.floats(1, 16))
def test_pages_of_the_chosen_widths_keep_the_budget(seed: int, heads: int, bits: float) -> None:
    loss = random_loss(seed, heads, 2 * HEAD_DIM)
    chosen = allocate(loss, bits, PAGE_BYTES, BLOCK)
    spent = 0.0
    for head in range(heads):
        key, value = row_of(chosen.bits[head, :HEAD_DIM]), row_of(chosen.bits[head, HEAD_DIM:])
        fmt = PageFormat(PAGE_BYTES, HEAD_DIM, BLOCK, key, value)
        assert fmt.capacity >= chosen.capacity[head]
        spent += 8 * fmt.bytes_per_token
    assert spent <= bits * loss[..., 0].size * (1 + 1e-9)
    index = np.searchsorted(WIDTHS, chosen.bits)
    expected = np.take_along_axis(loss, index[..., None], -1).sum()
    assert chosen.loss == pytest.approx(expected, rel=1e-6, abs=1e-7 * loss[..., 0].sum())


@given(SEEDS, st.lists(st.floats(1, 16), min_size=2, max_size=6))
def test_more_budget_is_never_more_loss(seed: int, budgets: list[float]) -> None:
    loss = random_loss(seed, 3, 2 * HEAD_DIM)
    losses = [allocate(loss, bits, PAGE_BYTES, BLOCK).loss for bits in sorted(budgets)]
    assert all(a >= b - 1e-9 * abs(b) for a, b in itertools.pairwise(losses))


def least_losses(loss: Floats, page_bytes: int, block: int) -> tuple[Floats, Floats]:
    """(cost, least loss) of one head for every number of blocks per page, every combination of widths tried."""
    widths = list(itertools.product(range(len(WIDTHS)), repeat=len(loss)))
    bits = np.array([sum(WIDTHS[w] for w in each) for each in widths])
    total = np.array([sum(loss[dim, w] for dim, w in enumerate(each)) for each in widths])
    tokens = block * np.arange(1, 8 * page_bytes // block + 1)
    return 8 * page_bytes / tokens, np.array([total[bits <= 8 * page_bytes // n].min() for n in tokens])


def last_vertex(cost: Floats, loss: Floats, budget: float) -> float:
    """Loss at the most expensive vertex within the budget of the lower convex hull of all points."""
    vertices: list[tuple[float, float]] = []
    for x, y in sorted(zip(cost.tolist(), loss.tolist(), strict=True)):
        if vertices and (y >= vertices[-1][1] or x == vertices[-1][0]):
            continue
        while len(vertices) > 1:
            (x0, y0), (x1, y1) = vertices[-2:]
            if (y1 - y0) * (x - x1) < (y - y1) * (x1 - x0) * (1 - 1e-9):
                break
            vertices.pop()
        vertices.append((x, y))
    return min(y for x, y in vertices if x <= budget)


@given(SEEDS, st.floats(1, 6))
def test_equals_every_combination_tried_up_to_the_last_step(seed: int, bits: float) -> None:
    page_bytes, block, heads, dims = 24, 8, 2, 3
    height = np.exp(np.random.default_rng(seed).normal(0, 2, (heads, dims, 1)))
    # Convex curves that end at 6 bits: then every upgrade is one bit, and no room is left for a half one.
    loss = height * 4.0 ** -np.minimum(WIDTHS, 6.0)
    each = [least_losses(head, page_bytes, block) for head in loss]
    cost, least = (np.add.outer(*(head[i] for head in each)).ravel() for i in range(2))
    chosen = allocate(loss, bits, page_bytes, block)
    budget = bits * heads * dims
    assert chosen.loss <= last_vertex(cost, least, budget) * (1 + 1e-9)
    assert chosen.loss >= least[cost <= budget * (1 + 1e-9)].min() * (1 - 1e-9)


def test_bits_follow_the_loss() -> None:
    loss = np.array([1000.0, 10.0, 10.0, 0.1])[None, :, None] * 4.0 ** -np.array(WIDTHS)
    bits = allocate(loss, 4, PAGE_BYTES, BLOCK).bits[0]
    assert bits[0] > bits[1] >= bits[2] > bits[3]


def test_heads_that_lose_nothing_still_get_rows() -> None:
    loss = random_loss(0, 3, 2 * HEAD_DIM)
    for silent in (loss * [[[0.0]], [[1.0]], [[1.0]]], 0 * loss):
        chosen = allocate(silent, 3, PAGE_BYTES, BLOCK)
        assert (chosen.bits.sum(1) > 0).all()
        assert np.isfinite(chosen.loss)


def test_too_small_a_budget_is_refused() -> None:
    with pytest.raises(ConfigError, match="use at least"):
        allocate(random_loss(0, 2, 256), 0.01, 16384, BLOCK)
