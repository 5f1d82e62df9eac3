import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvfold.kv.layout import CacheLayout
from kvfold.kv.pool import NO_PAGE, PagePool, PoolExhausted
from kvfold.kv.tables import ENTRY_BYTES, PageTables
from tests.kv.layouts import layouts

ENTRIES = range(4)


class TablesMachine(RuleBasedStateMachine):
    """Sequences that grow, fork and end over one small pool.

    Every token is a number of its own, written where the tables say its rows belong in each head. Whatever
    happens to other holders of the same pages, every sequence must read back its own numbers.
    """

    @initialize(layout=layouts(), n_pages=st.integers(10, 150))
    def make(self, layout: CacheLayout, n_pages: int) -> None:
        self.layout = layout
        self.pool = PagePool(n_pages, layout.page_bytes)
        self.bytes = self.pool.data.view(torch.int16).numpy()
        self.sequences: list[tuple[PageTables, list[int]]] = []
        self.next = 0

    def places(self, tables: PageTables, position: int, length: int) -> list[tuple[int, int]]:
        """(page, place in it) of a token in every head once there are `length`; NO_PAGE where it is released."""
        layout = self.layout
        near = int(tables.near_slots(np.array([position]), length)[0]) if not layout.exact else -1
        found = []
        for head, capacity in enumerate(layout.capacity.tolist()):
            if near >= 0:
                column, place = divmod(near, layout.near.capacity)
                found.append((int(tables.near[head, column]), place))
            else:
                column, place = divmod(position - layout.sinks, capacity)
                found.append((int(tables.far[head, column]), place))
        return found

    def number(self, token: int, head: int) -> int:
        return (token * 7 + head) % 2**15

    @precondition(lambda self: len(self.sequences) < len(ENTRIES))
    @rule()
    def start(self) -> None:
        self.sequences.append((PageTables(self.layout), []))

    @precondition(lambda self: self.sequences)
    @rule(entry=st.sampled_from(ENTRIES), count=st.sampled_from([1, 1, 2, 3, 7, 16, 40]))
    def grow(self, entry: int, count: int) -> None:
        tables, tokens = self.sequences[entry % len(self.sequences)]
        before, after = len(tokens), len(tokens) + count
        missing, free = tables.missing(self.pool, after), self.pool.free_pages
        held = tables.pages().tolist()
        if missing > free:
            with pytest.raises(PoolExhausted):
                tables.reserve(self.pool, after)
            assert tables.pages().tolist() == held
            return
        tables.reserve(self.pool, after)
        assert self.pool.free_pages == free - missing
        assert len(tables.pages()) == self.layout.pages(after, before)
        sealed = self.layout.sealed(after) if not self.layout.exact else before
        tokens.extend(range(self.next, self.next + count))
        self.next += count
        written = [p for p in range(self.layout.sealed(before), sealed) if p >= self.layout.sinks]
        for position in {*written, *range(before, after)}:
            for head, (page, place) in enumerate(self.places(tables, position, after)):
                assert page != NO_PAGE
                assert self.pool.references(np.array([page])) == 1
                self.bytes[page, place] = self.number(tokens[position], head)
        tables.advance(self.pool, after)

    @precondition(lambda self: 0 < len(self.sequences) < len(ENTRIES))
    @rule(entry=st.sampled_from(ENTRIES))
    def fork(self, entry: int) -> None:
        tables, tokens = self.sequences[entry % len(self.sequences)]
        free = self.pool.free_pages
        self.sequences.append((tables.fork(self.pool), list(tokens)))
        assert self.pool.free_pages == free

    @precondition(lambda self: self.sequences)
    @rule(entry=st.sampled_from(ENTRIES))
    def release(self, entry: int) -> None:
        tables, _ = self.sequences.pop(entry % len(self.sequences))
        tables.release(self.pool)
        assert tables.length == 0
        assert not len(tables.pages())

    @invariant()
    def pages_are_counted(self) -> None:
        self.pool.check_integrity([tables.pages() for tables, _ in self.sequences])
        for tables, tokens in self.sequences:
            pages = self.layout.pages(len(tokens))
            assert len(tables.pages()) == pages
            assert tables.nbytes == pages * (self.layout.page_bytes + ENTRY_BYTES)

    @invariant()
    def every_sequence_reads_its_own_tokens(self) -> None:
        for tables, tokens in self.sequences:
            length = len(tokens)
            for position in range(length):
                for head, (page, place) in enumerate(self.places(tables, position, length)):
                    window = self.layout.windows[head // self.layout.kv_heads]
                    if window is None or position > length - window:
                        assert page != NO_PAGE
                        assert self.bytes[page, place] == self.number(tokens[position], head)


TestTables = TablesMachine.TestCase
TestTables.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


@given(layouts(), st.integers(0, 120))
def test_near_slots_are_distinct_and_within_their_pages(layout: CacheLayout, length: int) -> None:
    slots = PageTables(layout).near_slots(np.arange(length), length)
    if layout.exact:
        assert (slots == -1).all()
        return
    kept = slots[slots >= 0]
    assert len(set(kept.tolist())) == len(kept) == min(length, layout.sinks) + max(0, length - layout.sealed(length))
    assert (kept < layout.near_slots(length)).all()
    assert layout.near_slots(length) <= layout.near_pages * layout.near.capacity
