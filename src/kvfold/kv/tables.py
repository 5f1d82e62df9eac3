"""The page tables of one sequence: which page of the pool holds which tokens of which layer and KV head."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvfold.kv.extents import Extents
from kvfold.kv.layout import CacheLayout
from kvfold.kv.pool import NO_PAGE, PagePool, Pages

Index = NDArray[np.int64]
ENTRY_BYTES = 4


@dataclass
class _Writes:
    """What adding tokens needs: table entries to fill and shared pages to copy before they are written."""

    near_new: Index  # columns of near pages
    near_copy: tuple[Index, Index]  # (heads, columns)
    far_new: tuple[Index, Index]
    far_copy: tuple[Index, Index]

    @property
    def pages(self) -> int:
        return len(self.near_copy[0]) + len(self.far_new[0]) + len(self.far_copy[0])


class PageTables:
    """Page ids of one sequence, int32; heads of all layers are flattened: head = layer * kv_heads + kv_head.

    near: [heads, near_pages], slot s in column s // capacity; far: [heads, columns], row r in column r // capacity
    of its head. `length` is the number of tokens the cache holds. Entries not in use are NO_PAGE.
    """

    def __init__(self, layout: CacheLayout) -> None:
        self.layout = layout
        self.length = 0
        heads = layout.layers * layout.kv_heads
        self.near: Pages = np.full((heads, layout.near_pages), NO_PAGE, np.int32)
        self.far: Pages = np.full((heads, 4), NO_PAGE, np.int32)

    def missing(self, pool: PagePool, length: int) -> int:
        """Pages that `reserve` would take from the pool."""
        writes = self._writes(pool, length)
        return writes.pages + len(writes.near_new) * len(self.near)

    def reserve(self, pool: PagePool, length: int) -> None:
        """Makes the pages for growing to `length` tokens writable. Raises PoolExhausted and then changes nothing."""
        writes = self._writes(pool, length)
        heads = len(self.near)
        pages = pool.allocate(writes.pages + len(writes.near_new) * heads)
        sizes = np.cumsum([len(writes.near_new) * heads, len(writes.far_new[0]), len(writes.near_copy[0])])
        near_new, far_new, near_copy, far_copy = np.split(pages, sizes)
        self.near[:, writes.near_new] = near_new.reshape(heads, -1)
        columns = int(writes.far_new[1].max(initial=-1)) + 1
        if columns > self.far.shape[1]:
            grown = np.full((heads, max(columns, 2 * self.far.shape[1])), NO_PAGE, np.int32)
            grown[:, : self.far.shape[1]] = self.far
            self.far = grown
        self.far[writes.far_new] = far_new
        for table, where, copies in ((self.near, writes.near_copy, near_copy), (self.far, writes.far_copy, far_copy)):
            shared = table[where]
            pool.copy(shared, copies)
            table[where] = copies
            pool.release(shared)

    def advance(self, pool: PagePool, length: int) -> None:
        """The cache now holds `length` tokens; pages behind every window that a later query can see are released."""
        self.length = length
        live = self.layout.live_rows(length) // self.layout.capacity
        if live.any():
            behind = np.arange(self.far.shape[1]) < live[:, None]
            pool.release(self.far[behind])
            self.far[behind] = NO_PAGE

    def fork(self, pool: PagePool) -> "PageTables":
        """A second holder of the same pages; whoever writes to a shared page copies it first."""
        twin = PageTables(self.layout)
        twin.length, twin.near, twin.far = self.length, self.near.copy(), self.far.copy()
        pool.retain(self.pages())
        return twin

    def release(self, pool: PagePool) -> None:
        """Gives every page back; the tables are empty afterwards."""
        pool.release(self.pages())
        self.near[:] = NO_PAGE
        self.far[:] = NO_PAGE
        self.length = 0

    def extents(self, length: int) -> Extents:
        """What is in use of the pages once `length` tokens are held, for which room has been made."""
        near, far = self._used(length)
        pages = np.concatenate([self.near, self.far[:, : far.shape[1]]], 1)
        recent = np.arange(pages.shape[1]) < self.near.shape[1]
        width = self.layout.near.key.raw_bits // 8
        return Extents.of(self.layout.layers, pages, np.concatenate([near, far], 1), recent, width)

    def take(self, pool: PagePool, length: int) -> None:
        """Empty tables get the pages of `length` tokens, whose bytes the caller brings.

        Raises PoolExhausted and then changes nothing.
        """
        near, far = (used > 0 for used in self._used(length))
        pages = pool.allocate(int(near.sum() + far.sum()))
        self.far = np.full((len(self.near), max(4, far.shape[1])), NO_PAGE, np.int32)
        self.near[near] = pages[: near.sum()]
        self.far[:, : far.shape[1]][far] = pages[near.sum() :]
        self.length = length

    def _used(self, length: int) -> tuple[Index, Index]:
        """Bytes in use of each near and far page at `length` tokens, [heads, near_pages] and [heads, columns]."""
        layout = self.layout
        near = np.arange(layout.near_pages) * layout.near.capacity
        slots = np.clip(layout.near_slots(length) - near, 0, layout.near.capacity)
        rows, first = layout.far_tokens(length), layout.live_rows(length) // layout.capacity
        columns = np.arange(-(-rows // int(layout.capacity.min())))
        tokens = np.clip(rows - columns * layout.capacity[:, None], 0, layout.capacity[:, None])
        tokens[columns < first[:, None]] = 0
        formats = [fmt for layer in layout.far for fmt in layer]
        block, size = (np.array(x)[:, None] for x in zip(*((f.block, f.block_bytes) for f in formats), strict=True))
        return np.tile(slots * layout.near.block_bytes, (len(self.near), 1)), -(-tokens // block) * size

    def pages(self) -> Pages:
        """Every page held, one entry per holder, [n]."""
        held: Pages = np.concatenate([self.near.ravel(), self.far.ravel()])
        held = held[held != NO_PAGE]
        return held

    @property
    def nbytes(self) -> int:
        """Bytes held: whole pages and their table entries."""
        return len(self.pages()) * (self.layout.page_bytes + ENTRY_BYTES)

    def near_columns(self, length: int) -> Index:
        """Columns of near pages written when the cache grows from its present length to `length` tokens."""
        slots = self.near_slots(np.arange(self.length, length), length)
        return np.unique(slots[slots >= 0] // self.layout.near.capacity)

    def near_slots(self, positions: Index, length: int) -> Index:
        """Near slot of each position once the cache holds `length` tokens; -1 for sealed ones."""
        layout = self.layout
        sealed = (positions >= layout.sinks) & (positions < layout.sealed(length))
        return np.where(sealed, -1, layout.slot_of(positions))

    def _writes(self, pool: PagePool, length: int) -> _Writes:
        layout = self.layout
        # All near pages of this length, written now or not: what a sequence holds depends on its length alone.
        filled = np.arange(-(-layout.near_slots(length) // layout.near.capacity))
        fresh = filled[self.near[0, filled] == NO_PAGE] if layout.near_pages else filled
        used = np.setdiff1d(self.near_columns(length), fresh)
        before, after = layout.far_tokens(self.length), layout.far_tokens(length)
        have, want = -(-before // layout.capacity), -(-after // layout.capacity)
        new = want - have
        head = np.repeat(np.arange(len(new)), new)
        column = np.arange(len(head)) - np.repeat(np.cumsum(new) - new, new) + have[head]
        partial = np.flatnonzero((before % layout.capacity != 0) & (after > before))
        last = have[partial] - 1
        far_shared = pool.shared(self.far[partial, last])
        near_heads, near_columns = np.divmod(np.arange(len(self.near) * len(used)), max(len(used), 1))
        near_columns = used[near_columns] if len(used) else near_columns
        near_shared = pool.shared(self.near[near_heads, near_columns])
        return _Writes(
            fresh,
            (near_heads[near_shared], near_columns[near_shared]),
            (head, column),
            (partial[far_shared], last[far_shared]),
        )
