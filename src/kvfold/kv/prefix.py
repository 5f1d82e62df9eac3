"""Caches of prefixes that requests left behind, found again by the tokens they hold."""

import hashlib
import itertools
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np

from kvfold.kv.pool import PagePool
from kvfold.kv.staged_tables import StagedTables
from kvfold.kv.tables import PageTables

AnyTables = TypeVar("AnyTables", PageTables, StagedTables)


class PrefixIndex(Generic[AnyTables]):
    """Frozen page tables by the tokens they were made from, least recently used first.

    A snapshot holds the exact recent tokens of its length too, so that whoever goes on from it computes what it
    would have computed without it. Its pages are shared by reference count and copied by whoever writes first.
    clock: indices that share one know which of them holds what was used least recently.
    """

    def __init__(self, pool: PagePool, clock: Iterator[int] | None = None) -> None:
        self._pool = pool
        self._clock = itertools.count() if clock is None else clock
        self._entries: OrderedDict[bytes, AnyTables] = OrderedDict()
        self._used: dict[bytes, int] = {}
        self._lengths: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._entries)

    def insert(self, tokens: Sequence[int], tables: AnyTables) -> None:
        """Takes over `tables`, which hold exactly `tokens`; releases them where the prefix is known already."""
        if len(tokens) != tables.length:
            raise ValueError(f"tables of {tables.length} tokens for a prefix of {len(tokens)}")
        digest = prefix_digests(tokens, [len(tokens)])[0]
        if digest in self._entries:
            tables.release(self._pool)
        else:
            self._entries[digest] = tables
            self._lengths[tables.length] += 1
        self._touch(digest)

    def match(self, tokens: Sequence[int]) -> AnyTables | None:
        """The longest snapshot of a proper prefix of `tokens`, to be forked, or None."""
        lengths = sorted(n for n in self._lengths if n < len(tokens))
        for digest in reversed(prefix_digests(tokens, lengths)):
            if digest in self._entries:
                return self._touch(digest)
        return None

    def find(self, tokens: Sequence[int]) -> AnyTables | None:
        """The snapshot of exactly these tokens, to be forked, or None."""
        digest = prefix_digests(tokens, [len(tokens)])[0]
        return self._touch(digest) if digest in self._entries else None

    @property
    def oldest(self) -> int | None:
        """When the least recently used snapshot was used, None where there is none."""
        return self._used[next(iter(self._entries))] if self._entries else None

    def evict(self) -> int:
        """Drops the least recently used snapshot. Returns how many tokens it had, 0 where there is none."""
        if not self._entries:
            return 0
        digest, tables = self._entries.popitem(last=False)
        del self._used[digest]
        length = tables.length
        self._lengths[length] -= 1
        if not self._lengths[length]:
            del self._lengths[length]
        tables.release(self._pool)
        return length

    def clear(self) -> None:
        while self.evict():
            pass

    def tables(self) -> list[AnyTables]:
        """All tables held, for the integrity check."""
        return list(self._entries.values())

    def evictable_pages(self) -> int:
        """Pages that would become free if every snapshot were dropped."""
        held = [tables.pages() for tables in self._entries.values()]
        if not held:
            return 0
        pages, counts = np.unique(np.concatenate(held), return_counts=True)
        return int((self._pool.references(pages) == counts).sum())

    def _touch(self, digest: bytes) -> AnyTables:
        self._entries.move_to_end(digest)
        self._used[digest] = next(self._clock)
        return self._entries[digest]


def prefix_digests(tokens: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
    """Hash of the first n tokens for each of the ascending lengths."""
    data = np.asarray(tokens, np.int64)
    state, done, found = hashlib.blake2b(digest_size=16), 0, []
    for n in lengths:
        state.update(data[done:n].tobytes())
        done = n
        found.append(state.copy().digest())
    return found
