"""The one pool of fixed-size byte pages that all sequences, layers, heads and methods draw from."""

import mmap
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvfold.errors import MemoryLimitError

Pages = NDArray[np.int32]
NO_PAGE = -1
SLACK = 64  # bytes after the last page: kernels read whole registers


class PoolExhausted(Exception):
    """Fewer free pages than asked for: the caller evicts or preempts and asks again; never reaches a user."""


def _memory(size: int, device: torch.device) -> Tensor:
    """Bytes in huge pages of the operating system where it has them: pages of the pool lie scattered, and looking up
    where small ones are takes a kernel longer than reading them. Raises RuntimeError or OSError where there is no room.
    """
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8, device=device)
    area = mmap.mmap(-1, size)
    with suppress(OSError):
        area.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(area, dtype=torch.uint8)


class PagePool:
    """`n_pages` pages of `page_bytes` bytes with reference counts.

    `data` is uint8 [n_pages, page_bytes] on `device`; the operating system commits a CPU's memory as pages are first
    written. The bookkeeping stays with the CPU.
    Nothing here looks into a page. Allocation takes the most recently freed pages first (they are warm in cache).
    """

    def __init__(self, n_pages: int, page_bytes: int, device: torch.device | str = "cpu") -> None:
        try:
            flat = _memory(n_pages * page_bytes + SLACK, torch.device(device))
        except (RuntimeError, OSError) as error:  # RuntimeError is torch's way to say it
            size = n_pages * page_bytes / 2**30
            raise MemoryLimitError(f"cannot allocate {size:.1f} GiB of KV memory; lower kv_memory") from error
        self.data = flat[: n_pages * page_bytes].view(n_pages, page_bytes)
        self.page_bytes = page_bytes
        self.n_pages = n_pages
        self.peak_in_use = 0
        self._references = np.zeros(n_pages, np.int32)
        self._free = np.arange(n_pages - 1, -1, -1, dtype=np.int32)
        self._n_free = n_pages

    @property
    def free_pages(self) -> int:
        return self._n_free

    @property
    def bytes_in_use(self) -> int:
        """Bytes of all pages that something refers to."""
        return (self.n_pages - self._n_free) * self.page_bytes

    def allocate(self, count: int) -> Pages:
        """`count` pages with one reference each. Raises PoolExhausted, and then changes nothing."""
        if count > self._n_free:
            raise PoolExhausted(f"{count} pages wanted, {self._n_free} free")
        self._n_free -= count
        pages = self._free[self._n_free : self._n_free + count][::-1].copy()
        self._references[pages] = 1
        self.peak_in_use = max(self.peak_in_use, self.n_pages - self._n_free)
        return pages

    def retain(self, pages: Pages) -> None:
        """One more reference to each page (NO_PAGE entries are skipped; a page may occur several times)."""
        np.add.at(self._references, pages[pages != NO_PAGE], 1)

    def release(self, pages: Pages) -> None:
        """One reference less to each page; pages without references become free."""
        pages = pages[pages != NO_PAGE]
        np.subtract.at(self._references, pages, 1)
        freed = np.unique(pages[self._references[pages] == 0])
        self._free[self._n_free : self._n_free + len(freed)] = freed
        self._n_free += len(freed)

    def references(self, pages: Pages) -> NDArray[np.int32]:
        """How many holders each page has."""
        return self._references[pages]

    def shared(self, pages: Pages) -> NDArray[np.bool_]:
        """Which of the pages have other holders, so that a writer must copy them first."""
        result: NDArray[np.bool_] = self._references[pages] > 1
        return result

    def copy(self, source: Pages, target: Pages) -> None:
        """Copies the bytes of pages to other pages."""
        to, whence = (torch.from_numpy(pages).long().to(self.data.device) for pages in (target, source))
        self.data[to] = self.data[whence]

    def check_integrity(self, holders: list[Pages]) -> None:
        """Raises AssertionError unless the references are exactly those of `holders` and the rest is free."""
        expected = np.zeros(self.n_pages, np.int32)
        for pages in holders:
            np.add.at(expected, pages[pages != NO_PAGE], 1)
        wrong = np.flatnonzero(expected != self._references)
        if wrong.size:
            page = wrong[0]
            raise AssertionError(f"page {page}: {self._references[page]} references, {expected[page]} holders")
        free = self._free[: self._n_free]
        if len(np.unique(free)) != self._n_free or (expected[free] != 0).any():
            raise AssertionError("the free list names a page twice or one that is in use")
        if self._n_free != np.count_nonzero(expected == 0):
            raise AssertionError("a page is neither free nor in use")
