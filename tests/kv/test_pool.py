from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvfold.errors import MemoryLimitError
from kvfold.kv.pool import NO_PAGE, PagePool, PoolExhausted

PAGE_BYTES = 8


class PoolMachine(RuleBasedStateMachine):
    """A pool against a counter of references; every page in use carries a number that must not change."""

    @initialize(n_pages=st.integers(0, 12))
    def make(self, n_pages: int) -> None:
        self.pool = PagePool(n_pages, PAGE_BYTES)
        self.model: Counter[int] = Counter()
        self.written: dict[int, int] = {}
        self.peak = 0
        self.next = 0

    def write(self, page: int) -> None:
        self.next = (self.next + 1) % 256
        self.pool.data[page] = self.next
        self.written[page] = self.next

    def some(self, data: st.DataObject) -> np.ndarray:
        """Held pages, each at most as often as it is held, among NO_PAGE entries."""
        each = list(self.model.elements())
        picked = data.draw(st.lists(st.sampled_from(range(len(each))), unique=True)) if each else []
        return np.array([NO_PAGE, *(each[i] for i in picked), NO_PAGE], np.int32)

    @rule(count=st.integers(0, 8))
    def allocate(self, count: int) -> None:
        if count > self.pool.n_pages - len(self.model):
            with pytest.raises(PoolExhausted):
                self.pool.allocate(count)
            return
        pages = self.pool.allocate(count).tolist()
        assert len(set(pages)) == count
        assert not set(pages) & set(self.model)
        self.model.update(pages)
        self.peak = max(self.peak, len(self.model))
        for page in pages:
            self.write(page)

    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        pages = self.some(data)
        self.pool.retain(pages)
        self.model.update(pages[pages != NO_PAGE].tolist())

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        pages = self.some(data)
        self.pool.release(pages)
        self.model.subtract(pages[pages != NO_PAGE].tolist())
        self.model = +self.model

    @precondition(lambda self: len(self.model) > 1)
    @rule(data=st.data())
    def copy(self, data: st.DataObject) -> None:
        source, target = data.draw(st.lists(st.sampled_from(sorted(self.model)), min_size=2, max_size=2, unique=True))
        self.pool.copy(np.array([source], np.int32), np.array([target], np.int32))
        self.written[target] = self.written[source]

    @invariant()
    def counts_agree(self) -> None:
        pool = self.pool
        held = sorted(self.model)
        pool.check_integrity([np.array(list(self.model.elements()), np.int32)])
        assert pool.free_pages == pool.n_pages - len(held)
        assert pool.bytes_in_use == len(held) * PAGE_BYTES
        assert pool.peak_in_use == self.peak
        pages = np.array(held, np.int32)
        assert pool.references(pages).tolist() == [self.model[p] for p in held]
        assert pool.shared(pages).tolist() == [self.model[p] > 1 for p in held]

    @invariant()
    def bytes_stay(self) -> None:
        for page in self.model:
            assert (self.pool.data[page] == self.written[page]).all()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_integrity_check_sees_lost_and_doubled_references() -> None:
    pool = PagePool(4, PAGE_BYTES)
    pages = pool.allocate(2)
    pool.check_integrity([pages])
    for holders in ([], [pages, pages[:1]], [pages[:1]]):
        with pytest.raises(AssertionError, match="references"):
            pool.check_integrity(holders)


def test_memory_that_the_machine_does_not_have_is_refused() -> None:
    with pytest.raises(MemoryLimitError, match="lower kv_memory"):
        PagePool(2**40, 2**16)
