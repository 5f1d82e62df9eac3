import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfold.kv.format import raw_format
from kvfold.kv.layout import CacheLayout
from tests.kv.layouts import BLOCK, HEAD_DIM, PAGE_BYTES, coded_format, layouts

LENGTH = st.integers(0, 150)


@given(layouts(), LENGTH)
def test_whole_units_are_sealed_once_the_recent_tokens_allow_it(layout: CacheLayout, length: int) -> None:
    sealed = layout.sealed(length)
    if layout.exact:
        assert sealed == length
        return
    units = [layout.sinks + n * layout.seal for n in range(length)]
    assert sealed == max([layout.sinks, *(u for u in units if length - u >= layout.recent)])
    assert layout.far_tokens(length) == sealed - layout.sinks
    assert max(0, length - sealed) <= layout.ring


@given(layouts(), st.lists(LENGTH, min_size=1, max_size=20))
def test_lengths_are_sealed_alike_one_by_one_and_together(layout: CacheLayout, lengths: list[int]) -> None:
    assert layout.sealed_each(torch.tensor(lengths)).tolist() == [layout.sealed(n) for n in lengths]


@given(layouts(), LENGTH, st.integers(0, 60))
def test_pages_are_those_of_the_tokens_that_can_still_be_seen(layout: CacheLayout, length: int, added: int) -> None:
    start = max(0, length - added)
    far, expected = layout.far_tokens(length), 0
    for layer, window in enumerate(layout.windows):
        for fmt in layout.far[layer]:
            # The query at `start` sees `window` positions, itself included; a partly filled page is continued.
            seen = 0 if window is None else max(0, min(start + 1 - window - layout.sinks, layout.far_tokens(start)))
            held = {row // fmt.capacity for row in range(seen, far)}
            held |= {far // fmt.capacity} if far % fmt.capacity else set()
            expected += len(held) + -(-layout.near_slots(length) // layout.near.capacity)
    assert layout.pages(length, start) == expected


def peaks(layout: CacheLayout, limit: int, chunk: int) -> list[int]:
    """The most pages held on the way to each length up to `limit` where every step adds up to `chunk` tokens."""
    needs = [max(layout.pages(n, start) for start in range(max(0, n - chunk), n + 1)) for n in range(limit + 1)]
    return np.maximum.accumulate(needs).tolist()


@given(layouts(), st.integers(1, 60), st.integers(1, 20))
def test_no_sequence_ever_holds_more_than_its_most_pages(layout: CacheLayout, limit: int, chunk: int) -> None:
    bounds = [layout.most_pages(n, chunk) for n in range(limit + 1)]
    assert bounds == sorted(bounds)
    for peak, bound, n in zip(peaks(layout, limit, chunk), bounds, range(limit + 1), strict=True):
        assert peak <= bound
        if set(layout.windows) == {None}:
            assert bound == layout.pages(n)


@given(layouts(), st.integers(0, 60), st.integers(1, 60), st.integers(1, 20))
def test_the_longest_sequence_fits_all_the_way(layout: CacheLayout, pages: int, limit: int, chunk: int) -> None:
    longest = layout.longest(pages, limit, chunk)
    assert peaks(layout, longest, chunk)[-1] <= pages
    assert longest == limit or layout.most_pages(longest + 1, chunk) > pages


def test_what_does_not_fit_together_is_refused() -> None:
    near, far = raw_format(PAGE_BYTES, HEAD_DIM), coded_format(4, 4)
    with pytest.raises(ValueError, match="one page size"):
        CacheLayout(((far,),), raw_format(2 * PAGE_BYTES, HEAD_DIM), 4, 8, (None,))
    with pytest.raises(ValueError, match="token by token"):
        CacheLayout(((far,),), far, 4, 8, (None,))
    layout = CacheLayout(((far, near),), near, 4, 8, (None,))
    assert layout.seal == BLOCK
    np.testing.assert_array_equal(layout.capacity, [16, 4])
