"""The bytes of a cache that mean something, layer by layer: what another pool needs to hold the same."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvfold.kv.pool import PagePool, Pages

Index = NDArray[np.int64]


@dataclass(frozen=True)
class Extents:
    """Pages of one sequence, layer after layer, int32 [n], and how many of the first bytes of each are in use, [n].

    starts: where each layer's pages begin, and the end of the last one's, [layers + 1].
    """

    pages: Pages
    used: Index
    starts: Index

    @classmethod
    def of(cls, layers: int, pages: Pages, used: Index) -> "Extents":
        """pages, used: [heads of all layers, columns]; entries that use 0 bytes are left out."""
        there = used > 0
        counts = there.reshape(layers, -1).sum(1)
        return cls(pages[there], used[there], np.concatenate([[0], np.cumsum(counts)]))

    @property
    def layers(self) -> int:
        return len(self.starts) - 1

    def size(self, layer: int) -> int:
        """Bytes that one layer has in use."""
        return int(self.used[self.starts[layer] : self.starts[layer + 1]].sum())

    def read(self, pool: PagePool, layer: int) -> NDArray[np.uint8]:
        """The bytes of one layer, page after page."""
        data = pool.data.numpy()
        mine = slice(self.starts[layer], self.starts[layer + 1])
        pieces = [data[page, :n] for page, n in zip(self.pages[mine], self.used[mine], strict=True)]
        return np.concatenate(pieces) if pieces else np.empty(0, np.uint8)

    def write(self, pool: PagePool, layer: int, found: NDArray[np.uint8]) -> None:
        """Puts what `read` gave into these pages. Raises ValueError for another number of bytes, writing nothing."""
        if len(found) != self.size(layer):
            raise ValueError(f"{len(found)} bytes for layer {layer}, which takes {self.size(layer)}")
        data, start = pool.data.numpy(), 0
        mine = slice(self.starts[layer], self.starts[layer + 1])
        for page, n in zip(self.pages[mine], self.used[mine], strict=True):
            data[page, :n] = found[start : start + n]
            start += int(n)
