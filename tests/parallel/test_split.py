"""Who has what: every token and unit once, and all that a query sees near within reach."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.kv.format import PageFormat, Row, Segment, raw_format
from kvfold.kv.layout import CacheLayout
from kvfold.parallel.errors import ParallelError
from kvfold.parallel.exchange import hops
from kvfold.parallel.split import Split, shared_heads

PAGE = 2048


def layout(sinks: int, recent: int, block: int, window: int | None = None) -> CacheLayout:
    row = Row((Segment(8, 8),))
    far = PageFormat(PAGE, 8, block, row, row)
    return CacheLayout(((far, far),), raw_format(PAGE, 8), sinks, recent, (window,))


LAYOUTS = st.builds(layout, st.integers(0, 5), st.integers(0, 40), st.sampled_from([1, 16, 32]))


@given(LAYOUTS, st.sampled_from(["ring", "ulysses"]), st.integers(1, 2), st.integers(1, 400))
def test_every_token_and_unit_is_on_one_rank(own: CacheLayout, variant: str, ranks: int, length: int) -> None:
    count = ranks if variant == "ulysses" else 2 * ranks + 1
    split = Split.of(own, variant, count, length)  # type: ignore[arg-type]
    assert sorted(np.concatenate(split.positions).tolist()) == list(range(length))
    assert split.positions[0][-1] == length - 1
    units = [u for rank in range(count) for each in split.units(rank) for u in range(each.first, each.last)]
    assert sorted(units) == list(range((own.sealed(length) - own.sinks) // own.seal))
    for rank in range(count):
        reach = set(split.positions[rank].tolist()) | set(split.borrowed[rank].tolist())
        for t in split.positions[rank].tolist():
            near = set(range(min(own.sinks, t + 1))) | set(range(max(own.sinks, own.sealed(t + 1)), t + 1))
            assert near <= reach
        lent = [split.lent(other, rank) for other in range(count) if other != rank]
        assert sorted(np.concatenate(lent).tolist() if lent else []) == split.borrowed[rank].tolist()


@given(st.integers(1, 5), st.integers(1, 600), st.sampled_from([None, 20, 100]))
def test_rows_go_round_as_far_as_somebody_sees_them(ranks: int, length: int, window: int | None) -> None:
    own = layout(4, 16, 16, window)
    split = Split.of(own, "ring", ranks, length)
    for origin in range(ranks):
        for units, far in zip(split.units(origin), hops(split, origin, window), strict=True):
            rows = range(own.sinks + units.first * own.seal, own.sinks + units.last * own.seal)
            for other in range(ranks):
                seen = any(
                    any(row < own.sealed(t + 1) and (window is None or row > t - window) for row in rows)
                    for t in split.positions[other].tolist()[:: 1 + length // 100]
                )
                assert not seen or (origin - other) % ranks <= far


def test_ring_ranks_have_as_many_keys_to_look_at() -> None:
    split = Split.of(layout(4, 16, 16), "ring", 4, 8192)
    work = [int(positions.sum()) for positions in split.positions]
    assert max(work) < 1.02 * min(work)


def test_heads_are_shared_out_unevenly_but_never_to_nobody() -> None:
    assert [len(heads) for heads in shared_heads(3, "ulysses", 2)] == [2, 1]
    assert shared_heads(2, "ring", 3) == ((0, 1),) * 3
    with pytest.raises(ParallelError, match="use the ring variant or at most 2 ranks"):
        shared_heads(2, "ulysses", 3)
