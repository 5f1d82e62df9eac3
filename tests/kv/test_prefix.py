from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvfold.kv.format import raw_format
from kvfold.kv.layout import CacheLayout
from kvfold.kv.pool import PagePool
from kvfold.kv.prefix import PrefixIndex
from kvfold.kv.tables import PageTables
from tests.kv.layouts import HEAD_DIM, PAGE_BYTES, coded_format

LAYOUT = CacheLayout(((coded_format(8, 8),) * 2,), raw_format(PAGE_BYTES, HEAD_DIM), 1, 3, (None,))
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=6)


def tables_of(pool: PagePool, length: int) -> PageTables:
    tables = PageTables(LAYOUT)
    tables.reserve(pool, length)
    tables.advance(pool, length)
    return tables


class PrefixMachine(RuleBasedStateMachine):
    """The index against a list of prefixes in the order of their last use."""

    @initialize()
    def make(self) -> None:
        self.pool = PagePool(600, PAGE_BYTES)
        self.index = PrefixIndex(self.pool)
        self.model: OrderedDict[tuple[int, ...], None] = OrderedDict()
        self.running: list[PageTables] = []

    def longest(self, tokens: list[int]) -> tuple[int, ...] | None:
        known = [p for p in self.model if len(p) < len(tokens) and list(p) == tokens[: len(p)]]
        return max(known, key=len, default=None)

    @rule(tokens=TOKENS)
    def insert(self, tokens: list[int]) -> None:
        self.index.insert(tokens, tables_of(self.pool, len(tokens)))
        self.model[tuple(tokens)] = None
        self.model.move_to_end(tuple(tokens))

    @rule(tokens=TOKENS)
    def match(self, tokens: list[int]) -> None:
        expected, known = self.longest(tokens), self.index.match(tokens)
        found = None if known is None else known.fork(self.pool)
        if expected is None:
            assert found is None
            return
        assert found is not None
        assert found.length == len(expected)
        self.model.move_to_end(expected)
        self.running.append(found)

    @rule(tokens=TOKENS)
    def match_and_continue(self, tokens: list[int]) -> None:
        """A request that goes on from a snapshot and leaves a longer one behind."""
        self.match(tokens)
        if self.longest(tokens) is None:
            return
        tables = self.running.pop()
        tables.reserve(self.pool, len(tokens))
        tables.advance(self.pool, len(tokens))
        self.index.insert(tokens, tables)
        self.model[tuple(tokens)] = None
        self.model.move_to_end(tuple(tokens))

    @rule()
    def end_all_requests(self) -> None:
        while self.running:
            self.running.pop().release(self.pool)

    @rule()
    def evict(self) -> None:
        assert bool(self.index.evict()) == bool(self.model)
        if self.model:
            self.model.popitem(last=False)

    @rule()
    def clear(self) -> None:
        evictable, free = self.index.evictable_pages(), self.pool.free_pages
        self.index.clear()
        self.model.clear()
        assert self.pool.free_pages == free + evictable

    @invariant()
    def pages_are_counted(self) -> None:
        assert len(self.index) == len(self.model)
        assert [t.length for t in self.index.tables()] == [len(p) for p in self.model]  # least recently used first
        self.pool.check_integrity([t.pages() for t in (*self.index.tables(), *self.running)])


TestPrefix = PrefixMachine.TestCase
TestPrefix.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


@given(TOKENS)
def test_a_whole_prompt_is_no_proper_prefix_of_itself(tokens: list[int]) -> None:
    pool = PagePool(100, PAGE_BYTES)
    index = PrefixIndex(pool)
    index.insert(tokens, tables_of(pool, len(tokens)))
    assert index.match(tokens) is None
    assert index.match([*tokens, 0]) is not None


def test_tables_of_another_length_are_refused() -> None:
    pool = PagePool(100, PAGE_BYTES)
    with pytest.raises(ValueError, match="5 tokens for a prefix of 4"):
        PrefixIndex(pool).insert([0] * 4, tables_of(pool, 5))
