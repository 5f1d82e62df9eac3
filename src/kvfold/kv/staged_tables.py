"""The page tables of one sequence under a staged layout: tracks of pages per head, each with its own length."""

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvfold.kv.extents import Extents
from kvfold.kv.frame import Basis
from kvfold.kv.pool import NO_PAGE, PagePool, Pages
from kvfold.kv.staged import StagedLayout, Watch
from kvfold.kv.tables import ENTRY_BYTES

Index = NDArray[np.int64]


class QueryRecord(Protocol):
    """What a method wants to know of the queries themselves."""

    def add(self, layer: int, q: Tensor, first: int, event: int) -> None:
        """Queries [count, H, d] after RoPE at positions [first, first + count); the next event is at `event`."""
        ...

    def copy(self) -> "QueryRecord": ...

    @property
    def state(self) -> Mapping[str, Tensor]:
        """What has been seen, to be read and to be overwritten in place."""
        ...

    @property
    def nbytes(self) -> int: ...


class StagedTables:
    """Page ids of one sequence; heads of all layers are flattened: head = layer * kv_heads + kv_head.

    pages: int32 [tracks, heads, columns]; rows: tokens in each track of each head, int64 [tracks, heads].
    length: tokens computed, whatever became of them; `settled`: the length at the last event. mass: per watch and
    track what attention its rows received, float32 [heads, width] with `width` no less than the rows. bases: per
    class the coordinates that coded rows are in (None: the model's own). spare: pages set aside for the event that
    the reserved tokens lead to.
    """

    def __init__(self, layout: StagedLayout, context: int, watches: Iterable[Watch] = ()) -> None:
        self.layout = layout
        self.context = context
        self.length = 0
        self.settled = 0
        self.pages_of: Pages = np.full((layout.tracks, layout.heads, 4), NO_PAGE, np.int32)
        self.rows: Index = np.zeros((layout.tracks, layout.heads), np.int64)
        self.mass: dict[Watch, list[Tensor]] = {
            watch: [torch.zeros(layout.heads, 0)] * layout.tracks for watch in (*layout.watches, *watches)
        }
        self.records: dict[str, QueryRecord] = {}
        self.bases: list[Basis | None] = [None] * len(layout.coded)
        self.spare: Pages = np.empty(0, np.int32)

    @property
    def next_event(self) -> int:
        return self.layout.next_event(self.length, self.context)

    @property
    def due(self) -> bool:
        """Whether an event is to happen before more tokens are added."""
        return self.settled != self.length and self.layout.is_event(self.length, self.context)

    @property
    def resident(self) -> float:
        """Tokens held, averaged over heads."""
        return float(self.rows.sum(0).mean())

    def missing(self, pool: PagePool, length: int) -> int:
        """Pages that `reserve` would take from the pool."""
        copies, heads, _ = self._writes(pool, length)
        return len(copies) + len(heads) + self._spare(pool, length)

    def reserve(self, pool: PagePool, length: int) -> None:
        """Makes the pages for growing to `length` tokens writable. Raises PoolExhausted and then changes nothing."""
        copies, heads, columns = self._writes(pool, length)
        spare = self._spare(pool, length)
        pages = pool.allocate(len(copies) + len(heads) + spare)
        copied, new, fresh = np.split(pages, [len(copies), len(copies) + len(heads)])
        self.spare = np.concatenate([self.spare, fresh])
        last = self.rows[0, copies] // self.layout.raw.capacity
        shared = self.pages_of[0, copies, last]
        pool.copy(shared, copied)
        self.pages_of[0, copies, last] = copied
        pool.release(shared)
        self._widen(int(columns.max(initial=-1)) + 1)
        self.pages_of[0, heads, columns] = new
        count = int(self.rows[0].max(initial=0)) + length - self.length
        for tracks in self.mass.values():
            tracks[0] = _widened(tracks[0], count)

    def advance(self, pool: PagePool, length: int) -> None:
        """The tokens up to `length` are in track 0 now."""
        self.rows[0] += length - self.length
        self.length = length

    def replace(self, pool: PagePool, track: int, head: int, rows: int) -> Pages:
        """Gives back the pages of one head's track and takes as many as `rows` tokens need. Returns them.

        The spare pages must have been released; what the old pages held must have been read.
        """
        pool.release(self.pages_of[track, head])
        count = -(-rows // int(self.layout.capacity[track, head]))
        pages = pool.allocate(count)
        self._widen(count)
        self.pages_of[track, head] = NO_PAGE
        self.pages_of[track, head, :count] = pages
        self.rows[track, head] = rows
        return pages

    def extend(self, pool: PagePool, track: int, head: int, rows: int) -> None:
        """Makes room for growing one head's track to `rows` tokens, the last page being its own afterwards."""
        capacity = int(self.layout.capacity[track, head])
        have, want = -(-int(self.rows[track, head]) // capacity), -(-rows // capacity)
        self._widen(want)
        pages = self.pages_of[track, head]
        pages[have:want] = pool.allocate(want - have)
        last = pages[have - 1 : have]
        if self.rows[track, head] % capacity and pool.shared(last)[0]:
            copied = pool.allocate(1)
            pool.copy(last, copied)
            pool.release(last)
            pages[have - 1] = copied[0]
        self.rows[track, head] = rows

    def release_spare(self, pool: PagePool) -> None:
        pool.release(self.spare)
        self.spare = np.empty(0, np.int32)

    def fork(self, pool: PagePool, layout: StagedLayout | None = None) -> "StagedTables":
        """A second holder of the same pages, under another layout if nothing has been coded yet."""
        twin = StagedTables(layout or self.layout, self.context)
        twin.length, twin.settled = self.length, self.settled
        tracks = min(len(self.rows), len(twin.rows))  # under another layout only the first one holds anything
        twin.rows[:tracks] = self.rows[:tracks]
        twin._widen(self.pages_of.shape[2])
        twin.pages_of[:tracks, :, : self.pages_of.shape[2]] = self.pages_of[:tracks]
        for watch, mass in self.mass.items():
            empty = [torch.zeros(self.layout.heads, 0)] * (len(twin.rows) - tracks)
            twin.mass[watch] = [m.clone() for m in mass[:tracks]] + empty
        twin.records = {name: record.copy() for name, record in self.records.items()}
        if layout is None:
            twin.bases = list(self.bases)
        pool.retain(twin.pages())
        return twin

    def release(self, pool: PagePool) -> None:
        """Gives every page back; the tables are empty afterwards."""
        pool.release(self.pages())
        self.pages_of[:] = NO_PAGE
        self.rows[:] = 0
        self.spare = np.empty(0, np.int32)
        self.mass, self.records = {}, {}
        self.length = self.settled = 0

    def extents(self, length: int) -> Extents:
        """What is in use of the pages; length: that of the tables."""
        used = self._used()
        shape = (self.layout.heads, used.shape[0] * used.shape[2])
        pages: Pages = self.pages_of[:, :, : used.shape[2]].transpose(1, 0, 2).reshape(shape)
        by_head: Index = used.transpose(1, 0, 2).reshape(shape)
        # Without other tracks the first one is the whole cache, and as large as the method is meant to leave it.
        recent = np.arange(shape[1]) < (used.shape[2] if self.layout.coded else 0)
        return Extents.of(self.layout.layers, pages, by_head, recent, self.layout.raw.key.raw_bits // 8)

    def take(self, pool: PagePool, length: int) -> None:
        """Empty tables whose `rows` are set get their pages, whose bytes the caller brings.

        Raises PoolExhausted and then changes nothing.
        """
        there = self._used() > 0
        pages = pool.allocate(int(there.sum()))
        self._widen(there.shape[2])
        self.pages_of[:, :, : there.shape[2]][there] = pages
        self.length = length

    def _used(self) -> Index:
        """Bytes in use of every page, [tracks, heads, columns]."""
        layout, capacity = self.layout, self.layout.capacity[..., None]
        columns = np.arange(int((-(-self.rows // self.layout.capacity)).max(initial=0)))
        tokens = np.clip(self.rows[..., None] - columns * capacity, 0, capacity)
        formats = [
            [layout.format(track, *divmod(head, layout.kv_heads)) for head in range(layout.heads)]
            for track in range(layout.tracks)
        ]
        block = np.array([[f.block for f in track] for track in formats])[..., None]
        size = np.array([[f.block_bytes for f in track] for track in formats])[..., None]
        used: Index = -(-tokens // block) * size
        return used

    def pages(self) -> Pages:
        """Every page held, one entry per holder, [n]."""
        held: Pages = np.concatenate([self.pages_of[self.pages_of != NO_PAGE], self.spare])
        return held

    @property
    def nbytes(self) -> int:
        """Bytes held: whole pages and their table entries, and whatever is kept beside them."""
        beside = sum(m.nbytes for tracks in self.mass.values() for m in tracks) + sum(
            r.nbytes for r in self.records.values()
        )
        # Classes may share a frame.
        frames = {id(f): f for basis in self.bases if basis is not None for f in (basis.key, basis.value)}
        beside += sum(frame.nbytes for frame in frames.values() if frame is not None)
        return len(self.pages()) * (self.layout.page_bytes + ENTRY_BYTES) + beside

    def _writes(self, pool: PagePool, length: int) -> tuple[Index, Index, Index]:
        """Heads whose last page is to be copied, and (heads, columns) of new pages, all in track 0."""
        rows, capacity = self.rows[0], self.layout.raw.capacity
        have, want = -(-rows // capacity), -(-(rows + length - self.length) // capacity)
        partial = np.flatnonzero((rows % capacity) * (length > self.length))
        shared = partial[pool.shared(self.pages_of[0, partial, have[partial] - 1])]
        new = want - have
        heads = np.repeat(np.arange(len(new)), new)
        columns = np.arange(len(heads)) - np.repeat(np.cumsum(new) - new, new) + have[heads]
        return shared, heads, columns

    def _spare(self, pool: PagePool, length: int) -> int:
        """Pages that the event at `length`, if there is one, may need beyond those that it frees."""
        if length == self.settled or not self.layout.is_event(length, self.context):
            return 0
        spare = self.layout.heads * len(self.layout.coded)
        if pool.shared(self.pages()).any():
            spare += self.layout.pages_after(length, self.context)
        return max(0, spare - len(self.spare))

    def _widen(self, columns: int) -> None:
        have = self.pages_of.shape[2]
        if columns > have:
            grown: Pages = np.full((*self.rows.shape, max(columns, 2 * have)), NO_PAGE, np.int32)
            grown[..., :have] = self.pages_of
            self.pages_of = grown


def _widened(mass: Tensor, width: int) -> Tensor:
    if width <= mass.shape[1]:
        return mass
    return torch.nn.functional.pad(mass, (0, max(width, mass.shape[1] + 64) - mass.shape[1]))
