"""The engine's KV memory: one pool, the layouts of its lanes and their prefix indices."""

import itertools
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any, TypeVar

from kvfold.engine.sequence import Sequence
from kvfold.errors import ConfigError, MemoryLimitError
from kvfold.kv.layout import CacheLayout
from kvfold.kv.pool import PagePool, PoolExhausted
from kvfold.kv.prefix import PrefixIndex
from kvfold.kv.staged import StagedLayout
from kvfold.kv.staged_tables import StagedTables
from kvfold.kv.tables import PageTables
from kvfold.methods.staging import Staging

Tables = PageTables | StagedTables
Taken = TypeVar("Taken")

GROWTH = 64  # tokens that an admitted sequence may generate before it could have to wait for memory


class KVMemory:
    """Pages for sequences of several lanes. Snapshots of prefixes live in what sequences leave free.

    prefixes: of each lane; those of staged lanes share one, which holds contexts just before they are compressed.
    """

    def __init__(
        self, kv_memory: int, layouts: Seq[CacheLayout | StagedLayout], stagings: Seq[Staging | None], chunk: int
    ) -> None:
        page_bytes = layouts[0].page_bytes
        if kv_memory < page_bytes:
            raise ConfigError(f"kv_memory={kv_memory} does not hold one page; give at least {page_bytes} bytes")
        self.layouts = list(layouts)
        self.pool = PagePool(kv_memory // page_bytes, page_bytes)
        clock = itertools.count()
        contexts: PrefixIndex[Any] = PrefixIndex(self.pool, clock)
        self.prefixes: list[PrefixIndex[Any]] = [
            contexts if isinstance(layout, StagedLayout) else PrefixIndex(self.pool, clock) for layout in layouts
        ]
        self._indices = list(dict.fromkeys(self.prefixes))
        staged = [staging for staging in stagings if staging is not None]
        # A context that one staged lane has read serves the others if everything was observed that they ask for.
        self._watches = tuple(dict.fromkeys(w for s in staged for w in s.layout.watches))
        self._records = {name: make for s in staged for name, make in s.records.items()}
        self.evicted_tokens = 0  # of snapshots dropped to make room, ever
        self._chunk = chunk

    def new_tables(self, lane: int, context: int) -> Tables:
        """Tables of a sequence that holds nothing yet; context: prompt tokens before the first event after it."""
        layout = self.layouts[lane]
        if isinstance(layout, CacheLayout):
            return PageTables(layout)
        tables = StagedTables(layout, context, self._watches)
        tables.records = {name: make() for name, make in self._records.items()}
        return tables

    def pages(self, lane: int, length: int, context: int | None = None) -> int:
        """The most pages a sequence needs at once while it grows to `length` tokens."""
        return self.layouts[lane].most_pages(length, self._chunk, context)

    def longest(self, lane: int, limit: int, context: int | None = None) -> int:
        """The longest sequence up to `limit` tokens that all of the memory can hold."""
        return self.layouts[lane].longest(self.pool.n_pages, limit, self._chunk, context)

    def check_prompt(self, lane: int, length: int, context: int) -> None:
        """Raises MemoryLimitError for a prompt that can never be served."""
        if length + 1 > self.longest(lane, length + 1, context):
            need = self.pages(lane, length + 1, context) * self.pool.page_bytes
            raise MemoryLimitError(
                f"a prompt of {length} tokens needs {need} bytes of KV memory, kv_memory is "
                f"{self.pool.n_pages * self.pool.page_bytes}; raise kv_memory or compress more"
            )

    def reserve(self, tables: Tables, length: int) -> bool:
        """Pages for growing to `length` tokens; drops snapshots where needed. False where that is not enough."""
        return self.with_room(lambda: tables.reserve(self.pool, length) or True) is not None

    def with_room(self, take: Callable[[], Taken]) -> Taken | None:
        """What `take` returns, which takes pages; drops snapshots where needed. None where that is not enough."""
        while True:
            try:
                return take()
            except PoolExhausted:
                if not self._evict():
                    return None

    def _evict(self) -> bool:
        """Drops the snapshot that was used least recently, of whatever lane. False where there is none."""
        used = [(index.oldest, index) for index in self._indices if index.oldest is not None]
        if used:
            self.evicted_tokens += min(used, key=lambda pair: pair[0])[1].evict()
        return bool(used)

    def available(self) -> int:
        """Pages that sequences could take: free ones and those that only snapshots hold."""
        return self.pool.free_pages + sum(index.evictable_pages() for index in self._indices)

    def wanted(self, sequence: Sequence, tables: Tables) -> int:
        """Pages that a sequence with these tables still asks for in the near future."""
        lane, context = sequence.request.lane, sequence.request.context
        length = min(len(sequence) + GROWTH, sequence.limit)
        layout = self.layouts[lane]
        if isinstance(layout, StagedLayout) and tables.length >= context:
            pages = layout.pages(length, context)  # the prompt has been compressed
        else:
            pages = self.pages(lane, length, context)
        return max(0, pages - len(tables.pages()))

    def check_integrity(self, tables: Seq[Tables]) -> None:
        """Raises AssertionError unless `tables` and the snapshots account for every page of the pool."""
        snapshots = [t for index in self._indices for t in index.tables()]
        self.pool.check_integrity([t.pages() for t in (*tables, *snapshots)])
