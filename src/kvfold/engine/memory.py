"""The engine's KV memory: one pool, the layouts of its lanes and their prefix indices."""

from collections.abc import Sequence as Seq

from kvfold.errors import ConfigError, MemoryLimitError, PromptError
from kvfold.kv.layout import CacheLayout
from kvfold.kv.pool import PagePool, PoolExhausted
from kvfold.kv.prefix import PrefixIndex
from kvfold.kv.tables import PageTables

GROWTH = 64  # tokens that an admitted sequence may generate before it could have to wait for memory


class KVMemory:
    """Pages for sequences of several lanes. Snapshots of prefixes live in what sequences leave free."""

    def __init__(self, kv_memory: int, layouts: Seq[CacheLayout], chunk: int) -> None:
        page_bytes = layouts[0].page_bytes
        if kv_memory < page_bytes:
            raise ConfigError(f"kv_memory={kv_memory} does not hold one page; give at least {page_bytes} bytes")
        self.layouts = list(layouts)
        self.pool = PagePool(kv_memory // page_bytes, page_bytes)
        self.prefixes = [PrefixIndex(self.pool) for _ in layouts]
        self.evicted_tokens = 0  # of snapshots dropped to make room, ever
        self._chunk = chunk

    def pages(self, lane: int, length: int) -> int:
        """The most pages a sequence needs at once while it grows to `length` tokens."""
        return self.layouts[lane].most_pages(length, self._chunk)

    def longest(self, lane: int, limit: int) -> int:
        """The longest sequence up to `limit` tokens that all of the memory can hold."""
        return self.layouts[lane].longest(self.pool.n_pages, limit, self._chunk)

    def check_prompt(self, lane: int, length: int, positions: int) -> None:
        """Raises PromptError or MemoryLimitError for a prompt that can never be served."""
        if length == 0:
            raise PromptError("the prompt is empty; give at least one token")
        if length >= positions:
            raise PromptError(f"the prompt has {length} tokens, the model takes {positions - 1}; shorten the prompt")
        if length + 1 > self.longest(lane, length + 1):
            need = self.pages(lane, length + 1) * self.pool.page_bytes
            raise MemoryLimitError(
                f"a prompt of {length} tokens needs {need} bytes of KV memory, kv_memory is "
                f"{self.pool.n_pages * self.pool.page_bytes}; raise kv_memory or compress more"
            )

    def reserve(self, tables: PageTables, length: int) -> bool:
        """Pages for growing to `length` tokens; drops snapshots where needed. False where that is not enough."""
        while True:
            try:
                tables.reserve(self.pool, length)
            except PoolExhausted:
                evicted = next(filter(None, (index.evict() for index in self.prefixes)), 0)
                if not evicted:
                    return False
                self.evicted_tokens += evicted
            else:
                return True

    def available(self) -> int:
        """Pages that sequences could take: free ones and those that only snapshots hold."""
        return self.pool.free_pages + sum(index.evictable_pages() for index in self.prefixes)

    def wanted(self, lane: int, length: int, limit: int, held: int) -> int:
        """Pages that a sequence of `length` tokens with `held` pages still asks for in the near future."""
        return max(0, self.pages(lane, min(length + GROWTH, limit)) - held)

    def check_integrity(self, tables: Seq[PageTables]) -> None:
        """Raises AssertionError unless `tables` and the snapshots account for every page of the pool."""
        snapshots = [t for index in self.prefixes for t in index.tables()]
        self.pool.check_integrity([t.pages() for t in (*tables, *snapshots)])
