"""Which tokens of which sequences run in the next step: first come, first served, by bytes of the pool."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from kvfold.config.engine import EngineConfig
from kvfold.engine.memory import KVMemory, Tables
from kvfold.engine.sequence import Sequence
from kvfold.kv.layout import CacheLayout
from kvfold.kv.staged import StagedLayout
from kvfold.kv.staged_tables import StagedTables
from kvfold.kv.tables import PageTables


@dataclass(frozen=True)
class Scheduled:
    """`count` tokens of a sequence, from its `computed`-th on; their pages are reserved."""

    sequence: Sequence
    count: int

    @property
    def prompt_count(self) -> int:
        """How many of the tokens are the prompt's."""
        left = len(self.sequence.request.prompt_token_ids) - self.sequence.computed
        return max(0, min(self.count, left))


class Scheduler:
    """Sequences wait in order of arrival and run in order of arrival; whoever has a context that is being read lets
    others pass until it can be shared. When memory runs out the youngest running one is preempted: its pages are
    freed, and it computes its tokens again when it gets back.

    settle: runs the event that a sequence's tables are due for, its spare pages being reserved."""

    def __init__(self, config: EngineConfig, memory: KVMemory, settle: Callable[[Sequence], None]) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._refused: Sequence | None = None  # whoever waits first and did not fit: asking again costs much
        self._free_then = 0  # pages that were free at that time
        # Totals since the start.
        self.preemptions = 0
        self.prefix_queried_tokens = 0
        self.prefix_hit_tokens = 0
        self._config = config
        self._memory = memory
        self._settle = settle

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def join(self, sequence: Sequence, origin: Sequence) -> None:
        """A sequence that already holds tables, forked from the running `origin`: it is as old as that one."""
        self.running.insert(self.running.index(origin) + 1, sequence)

    def schedule(self) -> list[Scheduled]:
        """Tokens for one step; empty only where nothing waits or runs, or where caches that are to be fetched by others
        take all the memory."""
        budget = self._config.max_batch_tokens
        scheduled: list[Scheduled] = []
        for sequence in list(self.running):
            if not budget:
                break
            if sequence not in self.running:
                continue  # preempted for an older one
            count = self._count(sequence, budget)
            if count and self._make_room(sequence, count):
                scheduled.append(Scheduled(sequence, count))
                budget -= count
        if self._memory.pool.free_pages > self._free_then:  # a window left pages behind
            self.reconsider()
        while budget:
            entering = next((s for s in self.waiting if not self._is_being_read(s)), None)
            if entering is None or entering is self._refused or not self._has_place(entering):
                break
            if not self._admit(entering):
                self._refused, self._free_then = entering, self._memory.pool.free_pages
                break
            self.waiting.remove(entering)
            self.running.append(entering)
            count = self._count(entering, budget)
            if not self._memory.reserve(entering.held, entering.computed + count):
                self._preempt(entering)
                self._refused, self._free_then = entering, self._memory.pool.free_pages
                break
            scheduled.append(Scheduled(entering, count))
            budget -= count
        return scheduled

    def reconsider(self) -> None:
        """Memory was freed, or a prefix is known that was not: who did not fit may fit now."""
        self._refused = None

    def release(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and frees its pages."""
        self.reconsider()
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence.tables is not None:
            sequence.tables.release(self._memory.pool)
            sequence.tables = None

    def _has_place(self, sequence: Sequence) -> bool:
        """Whether the batch has room for a sequence and those that will be forked from it; a lone one always runs."""
        taken = sum(s.forks for s in self.running) + sequence.forks
        return not self.running or taken <= self._config.max_sequences

    def _count(self, sequence: Sequence, budget: int) -> int:
        end = min(len(sequence), sequence.computed + min(self._config.chunk, budget))
        if isinstance(sequence.tables, StagedTables):
            end = min(end, sequence.tables.next_event)
        elif self._config.prefix_caching:
            # Chunks end where snapshots are taken, if they can.
            aligned = end - end % self._config.prefix_block
            end = aligned if aligned > sequence.computed else end
        return end - sequence.computed

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        while not self._memory.reserve(sequence.held, sequence.computed + count):
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.held.release(self._memory.pool)
        sequence.tables = None
        self.reconsider()
        sequence.request.metrics.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(sequence)

    def _admit(self, sequence: Sequence) -> bool:
        """Gives a waiting sequence its tables if all that runs, and it, fit for a while; a lone one always runs."""
        memory = self._memory
        tables = self._known(sequence) or memory.new_tables(sequence.request.lane, sequence.request.context)
        promised = sum(memory.wanted(s, s.held) for s in self.running)
        due = isinstance(tables, StagedTables) and tables.due
        fits = not self.running or promised + memory.wanted(sequence, tables) <= memory.available()
        if not fits or (due and not memory.reserve(tables, tables.length)):
            tables.release(memory.pool)
            return False
        sequence.tables = tables
        if due:
            self._settle(sequence)
        if sequence.request.metrics.first_token_time is None:
            sequence.request.metrics.cached_prompt_tokens = tables.length
            self.prefix_queried_tokens += len(sequence)
            self.prefix_hit_tokens += tables.length
        return True

    def _is_being_read(self, sequence: Sequence) -> bool:
        """Whether a running sequence is about to leave behind what this one can begin with: its context."""
        if not self._shares_context(sequence):
            return False
        context = sequence.request.context
        return any(
            other.computed < context == other.request.context
            and self._shares_context(other)
            and other.tokens[:context] == sequence.tokens[:context]
            for other in self.running
        )

    def _shares_context(self, sequence: Sequence) -> bool:
        """Whether a sequence leaves its context, uncompressed, to others, and takes it from them."""
        request, layout = sequence.request, self._memory.layouts[sequence.request.lane]
        if not self._config.prefix_caching or not isinstance(layout, StagedLayout) or layout.chunk is not None:
            return False
        # The last token of a prompt has to be computed for its logits.
        return request.context < len(request.prompt_token_ids) and request.params.prompt_logprobs is None

    def _known(self, sequence: Sequence) -> Tables | None:
        """A fork of what is known of the sequence's beginning, if anything."""
        request, pool = sequence.request, self._memory.pool
        if not self._config.prefix_caching or request.params.prompt_logprobs is not None:
            return None
        index, layout = self._memory.prefixes[request.lane], self._memory.layouts[request.lane]
        if isinstance(layout, CacheLayout):
            # A hit may not go past the first position whose logits are wanted.
            tokens = sequence.tokens if request.tap is None else sequence.tokens[: request.tap.start + 1]
            known: PageTables | None = index.match(tokens)
            return None if known is None else known.fork(pool)
        shared = self._shares_context(sequence)
        context: StagedTables | None = index.find(sequence.tokens[: request.context]) if shared else None
        return None if context is None else context.fork(pool, layout)
