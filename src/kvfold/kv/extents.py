"""The bytes of a cache that mean something, layer by layer: what another pool needs to hold the same."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvfold.kv import exponents
from kvfold.kv.exponents import Bytes
from kvfold.kv.pool import PagePool, Pages

Index = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Extents:
    """Pages of one sequence, layer after layer, int32 [n], and how many of the first bytes of each are in use, [n].

    recent: which pages hold the uncompressed rows of a compressed cache, bool [n]. They are a few hundred tokens, but
    each weighs as much as four to eight others, so they travel with packed exponents (`kvfold.kv.exponents`), as
    numbers of `width` bytes. starts: where each layer's pages begin, and the end of the last one's, [layers + 1].
    """

    pages: Pages
    used: Index
    recent: Mask
    width: int
    starts: Index

    @classmethod
    def of(cls, layers: int, pages: Pages, used: Index, recent: Mask, width: int) -> "Extents":
        """pages, used: [heads of all layers, columns]; entries that use 0 bytes are left out. recent: [columns]."""
        there = used > 0
        counts = there.reshape(layers, -1).sum(1)
        starts = np.concatenate([[0], np.cumsum(counts)])
        return cls(pages[there], used[there], np.broadcast_to(recent, used.shape)[there], width, starts)

    @property
    def layers(self) -> int:
        return len(self.starts) - 1

    def size(self, layer: int) -> int:
        """Bytes that one layer has in use."""
        return int(self.used[self.starts[layer] : self.starts[layer + 1]].sum())

    def most(self, layer: int) -> int:
        """Bytes that `read` gives at the most."""
        return self.size(layer) + exponents.MOST_MORE

    def read(self, pool: PagePool, layer: int) -> Bytes:
        """The bytes of one layer, page after page, recent rows first and packed."""
        data = pool.data.numpy()
        packed, plain = (
            [data[page, :n] for page, n in zip(self.pages[at], self.used[at], strict=True)] for at in self._split(layer)
        )
        if packed:
            plain = [exponents.pack(np.concatenate(packed), self.width), *plain]
        return np.concatenate(plain) if plain else np.empty(0, np.uint8)

    def write(self, pool: PagePool, layer: int, found: Bytes) -> None:
        """Puts what `read` gave into these pages. Raises ValueError for other bytes, writing nothing."""
        packed, plain = self._split(layer)
        numbers, end = found[:0], 0
        if len(packed):
            numbers, end = exponents.unpack(found, int(self.used[packed].sum()), self.width)
        if len(found) - end != self.used[plain].sum():
            raise ValueError(f"{len(found)} bytes for layer {layer}, which has {self.size(layer)} in use")
        data = pool.data.numpy()
        for where, source in ((packed, numbers), (plain, found[end:])):
            start = 0
            for page, n in zip(self.pages[where], self.used[where], strict=True):
                data[page, :n] = source[start : start + n]
                start += int(n)

    def _split(self, layer: int) -> tuple[Index, Index]:
        """A layer's pages of recent rows, and the others."""
        mine = np.arange(self.starts[layer], self.starts[layer + 1])
        return mine[self.recent[mine]], mine[~self.recent[mine]]
