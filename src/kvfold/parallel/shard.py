"""What one rank holds of a sequence: pages of sealed rows, and on the rank that goes on, the near rows."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvfold.kv.access import read_blocks, write_blocks
from kvfold.kv.format import PageFormat
from kvfold.kv.layout import CacheLayout
from kvfold.kv.packing import decode, encode
from kvfold.kv.pool import NO_PAGE, PagePool, Pages
from kvfold.kv.tables import ENTRY_BYTES
from kvfold.parallel.far import Blocks, HeadFormats

Index = NDArray[np.int64]


class FarShard:
    """Sealed units of some KV heads: all units (ulysses), or some units of all heads (ring).

    units: their numbers, ascending, int64 [n]. tables: [layers, heads, columns]; the i-th unit is rows i * seal on, row
    r is in column r // capacity of its head. Pages behind a layer's window are NO_PAGE.
    """

    def __init__(self, pool: PagePool, layout: CacheLayout, heads: tuple[int, ...]) -> None:
        self.units: Index = np.empty(0, np.int64)
        self.tables: Pages = np.full((layout.layers, len(heads), 0), NO_PAGE, np.int32)
        self._pool, self._layout, self._heads = pool, layout, heads
        self._capacity = layout.capacity.reshape(layout.layers, -1)[:, list(heads)]

    def grow(self, units: Index, length: int) -> None:
        """Room for more units, all above those held, of which a query from position `length` on may see something.
        Raises PoolExhausted and then changes nothing."""
        every = np.concatenate([self.units, units])
        wanted = self._live(every, length)
        tables = np.full(wanted.shape, NO_PAGE, np.int32)
        tables[..., : self.tables.shape[2]] = self.tables
        fresh = wanted & (tables == NO_PAGE)
        if len(self.units):  # what was let go stays gone
            before = -(-len(self.units) * self._layout.seal // self._capacity)
            fresh &= np.arange(wanted.shape[2]) >= before[..., None]
        tables[fresh] = self._pool.allocate(int(fresh.sum()))
        self.units, self.tables = every, tables

    def write(self, formats: HeadFormats, first: int, blocks: Blocks) -> None:
        """Stores units of one layer from the `first`-th that is held on, where a query may still see them."""
        for (fmt, places), own in zip(formats.groups, blocks, strict=True):
            if not own.numel():
                continue
            index = first * self._layout.seal // fmt.block + np.arange(own.shape[1])
            pages = self.tables[formats.layer][places.numpy()][:, index // fmt.blocks]
            kept = torch.from_numpy(pages != NO_PAGE)
            inside = torch.from_numpy(index % fmt.blocks).expand_as(kept)
            ids = torch.from_numpy(pages.astype(np.int64))
            write_blocks(self._pool.data, fmt, ids[kept], inside[kept], own[kept])

    def read(self, formats: HeadFormats, units: int | None = None) -> Blocks:
        """The first units of one layer (None: all); those behind its window hold anything."""
        wanted = len(self.units) if units is None else units
        found = []
        for fmt, places in formats.groups:
            count = wanted * self._layout.seal // fmt.block
            columns = -(-count // fmt.blocks)
            pages = self.tables[formats.layer][places.numpy()][:, :columns].astype(np.int64)
            found.append(read_blocks(self._pool.data, fmt, torch.from_numpy(pages))[:, :count])
        return found

    def advance(self, length: int) -> None:
        """The sequence has `length` tokens: releases the pages that later queries cannot see."""
        if any(window is not None for window in self._layout.windows):
            behind = ~self._live(self.units, length)
            self._pool.release(self.tables[behind])
            self.tables[behind] = NO_PAGE

    def release(self) -> None:
        """Gives every page back."""
        self._pool.release(self.pages())
        self.units, self.tables = self.units[:0], self.tables[..., :0]

    def pages(self) -> Pages:
        held: Pages = self.tables[self.tables != NO_PAGE]
        return held

    def needed(self, units: Index, length: int) -> int:
        """Pages for these units once the sequence has `length` tokens."""
        return int(self._live(units, length).sum())

    def _live(self, units: Index, length: int) -> NDArray[np.bool_]:
        """Columns that hold something a query from position `length` on may see, [layers, heads, columns]."""
        layout = self._layout
        rows = len(units) * layout.seal
        last = -(-rows // self._capacity)
        first = np.zeros_like(last)
        for layer, window in enumerate(layout.windows):
            if window is not None:
                ends = layout.sinks + (units + 1) * layout.seal
                unseen = int(np.searchsorted(ends, length - window + 1, side="right"))
                first[layer] = unseen * layout.seal // self._capacity[layer]
        column = np.arange(int(last.max(initial=0)))
        return (column >= first[..., None]) & (column < last[..., None])


class NearRows:
    """Sinks and recent rows of all heads in near pages, [layers, KV heads, columns], on the rank that goes on."""

    def __init__(self, pool: PagePool, layout: CacheLayout) -> None:
        self._pool, self._layout = pool, layout
        shape = (layout.layers, layout.kv_heads, layout.near_pages)
        self.tables: Pages = pool.allocate(int(np.prod(shape))).reshape(shape)

    def write(self, layer: int, positions: Index, k: Tensor, v: Tensor) -> None:
        """k, v: [n, G, d] at these positions."""
        if not len(positions) or not self._layout.near_pages:
            return
        fmt, slots = self._layout.near, torch.from_numpy(self._layout.slot_of(positions))
        pages = torch.from_numpy(self.tables[layer].astype(np.int64))[:, slots // fmt.capacity].T
        index = (slots % fmt.capacity)[:, None].expand_as(pages)
        write_blocks(self._pool.data, fmt, pages, index, encode(fmt, k.unsqueeze(-2), v.unsqueeze(-2)))

    def read(self, layer: int, positions: Index) -> tuple[Tensor, Tensor]:
        """float32 [n, G, d] each."""
        fmt: PageFormat = self._layout.near
        if not len(positions) or not self._layout.near_pages:
            nothing = torch.empty(0, self._layout.kv_heads, fmt.head_dim)
            return nothing, nothing
        pages = torch.from_numpy(self.tables[layer].astype(np.int64))
        slots = torch.from_numpy(self._layout.slot_of(positions))
        k, v = (x[..., slots].permute(2, 0, 1) for x in decode(fmt, read_blocks(self._pool.data, fmt, pages)))
        return k, v

    def release(self) -> None:
        self._pool.release(self.tables)
        self.tables = np.full_like(self.tables, NO_PAGE)

    def pages(self) -> Pages:
        held: Pages = self.tables[self.tables != NO_PAGE]
        return held


def held_bytes(page_bytes: int, pages: int) -> int:
    """Whole pages and their table entries."""
    return pages * (page_bytes + ENTRY_BYTES)
