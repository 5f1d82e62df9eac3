"""Prompts read here and answered elsewhere: caches that leave an engine, and caches that come."""

import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvfold.engine.lane import MethodLane
from kvfold.engine.memory import KVMemory, Tables
from kvfold.engine.scheduler import Scheduled, Scheduler
from kvfold.engine.sequence import Request, Sequence
from kvfold.errors import MemoryLimitError, TransferError
from kvfold.kv import wire
from kvfold.kv.extents import Extents
from kvfold.kv.pool import PagePool
from kvfold.kv.staged_state import dump_state, load_state
from kvfold.kv.staged_tables import StagedTables

Part = NDArray[np.uint8]
FETCHES = 8  # caches that an engine takes over at once


class Outgoing:
    """A cache that another engine may fetch, part by part, while the last of it is still being computed.

    Its parts are the layers, from 0, and the tail. Its pages stay until it is closed. Any thread may read it.
    """

    def __init__(self, request_id: str, header: wire.Header, tables: Tables, pool: PagePool) -> None:
        self.request_id = request_id
        self.header = header
        self.tables = tables
        self.extents = tables.extents(header.length)
        self._pool = pool
        self._layers = 0
        self._tail: bytes | None = None
        self._ended: str | None = None
        self._changed = threading.Condition()

    @property
    def parts(self) -> int:
        """Layers, and the tail."""
        return self.extents.layers + 1

    @property
    def nbytes(self) -> int:
        """Bytes of pages that go over."""
        return int(self.extents.used.sum())

    def computed(self, layers: int) -> None:
        """The pages of so many layers are complete."""
        with self._changed:
            self._layers = layers
            self._changed.notify_all()

    def finish(self, tail: wire.Tail) -> None:
        """Everything is there."""
        with self._changed:
            self._layers = self.extents.layers
            self._tail = msgspec.msgpack.encode(tail)
            self._changed.notify_all()

    def part(self, number: int, timeout: float) -> Part:
        """The bytes of a part, as soon as they are there. Raises TransferError after `timeout` seconds, or closed."""
        with self._changed:
            there = self._changed.wait_for(lambda: self._ended or self._there(number), timeout)
            if self._ended is not None:
                raise TransferError(self._ended)
            if not there:
                raise TransferError(f"part {number} of a KV cache was not computed within {timeout:g} s; send it again")
            if number < self.extents.layers:
                return self.extents.read(self._pool, number)  # a copy: pages may be gone when it is sent
            assert self._tail is not None
            return np.frombuffer(self._tail, np.uint8)

    def close(self, why: str) -> None:
        """Gives the pages back; whoever still wants parts gets a TransferError."""
        with self._changed:
            if self._ended is None:
                self._ended = why
                self.tables.release(self._pool)
            self._changed.notify_all()

    def _there(self, number: int) -> bool:
        return number < self._layers if number < self.extents.layers else self._tail is not None


@dataclass(frozen=True)
class Arriving:
    """Room for a cache that is on its way; `extents` says where the bytes go."""

    header: wire.Header
    lane: int
    completions: int
    tables: Tables
    extents: Extents


class Handovers:
    """What an engine gives away and takes over. `outbox`: caches that were not fetched yet, by request id.

    on_offer: told of each cache before it is complete, so that the other side can begin to fetch it.
    """

    def __init__(self, lanes: Seq[MethodLane], memory: KVMemory, scheduler: Scheduler, most: int) -> None:
        self.outbox: dict[str, Outgoing] = {}
        self.arriving: list[Arriving] = []
        self.on_offer: Callable[[Outgoing], None] = lambda outgoing: None
        self._lanes = lanes
        self._memory = memory
        self._scheduler = scheduler
        self._most = most  # sequences that run at once

    def begin(self, item: Scheduled) -> None:
        """Offers the cache of a prompt whose last tokens are about to be computed, unless nobody waits for it, nobody
        will want it, or compressing it comes after computing it."""
        request, tables = item.sequence.request, item.sequence.held
        complete = item.sequence.computed + item.count == len(item.sequence)
        going_on = any(len(s) + 1 < s.limit for s in request.sequences)
        if request.handover and complete and going_on and not isinstance(tables, StagedTables):
            self._offer(item.sequence, len(item.sequence))

    def finish(self, request: Request) -> None:
        """The prompt was computed and first tokens sampled: what goes on does so elsewhere."""
        going_on = [s for s in request.sequences if not s.output.finished]
        if not going_on:
            self.release(request.id, "the request has ended")
            return
        outgoing = self.outbox.get(request.id) or self._offer(going_on[0], going_on[0].computed)
        state = b""
        if isinstance(outgoing.tables, StagedTables):
            state = dump_state(outgoing.tables, self._lanes[request.lane].shared_bases)
        outputs = [None if s.output.finished else s.output.token_ids for s in request.sequences]
        outgoing.finish(wire.Tail(state, outputs))
        now = time.monotonic()
        for sequence in going_on:
            sequence.output.finish_reason = "handover"
            request.metrics.finished_time = now
            self._scheduler.release(sequence)

    def release(self, request_id: str, why: str = "it was fetched") -> None:
        """Frees the pages of a cache that is no longer wanted here, if there is one."""
        outgoing = self.outbox.pop(request_id, None)
        if outgoing is not None:
            outgoing.close(why)
            self._scheduler.reconsider()

    def expect(self, header: wire.Header, lane: int, completions: int = 1) -> Arriving | None:
        """Makes room for a cache that another engine holds; None while there is none.

        Raises TransferError for what cannot be used here, MemoryLimitError for what all of the memory does not hold.
        """
        self._lanes[lane].identity.check(header.identity)
        memory, scheduler = self._memory, self._scheduler
        layout = memory.layouts[lane]
        if header.length + 1 > memory.longest(lane, header.length + 1, header.context):
            size = memory.pool.n_pages * memory.pool.page_bytes
            raise MemoryLimitError(
                f"a cache of {header.length} tokens does not fit {size} bytes of KV memory; raise kv_memory"
            )
        running = scheduler.running
        taken = sum(s.forks for s in running) + sum(a.completions for a in self.arriving) + completions
        promised = sum(memory.wanted(s, s.held) for s in running)
        busy = bool(running or self.arriving)
        if busy and (taken > self._most or promised + layout.pages(header.length, header.context) > memory.available()):
            return None
        tables = memory.with_room(lambda: wire.make_room(memory.pool, layout, header))
        if tables is None:
            return None
        arriving = Arriving(header, lane, completions, tables, tables.extents(header.length))
        self.arriving.append(arriving)
        return arriving

    def accept(self, arriving: Arriving, tail: wire.Tail, sequences: Seq[Sequence]) -> None:
        """All parts are there: the completions of a request go on with them."""
        lane = self._lanes[arriving.lane]
        tables = arriving.tables
        if isinstance(tables, StagedTables):
            records = {} if lane.staging is None else lane.staging.records
            try:
                load_state(tail.state, tables, lane.shared_bases, records)
            except ValueError as error:
                raise TransferError(f"the end of a KV cache cannot be read: {error}; it is sent again") from error
        self.arriving.remove(arriving)
        for index, sequence in enumerate(sequences):
            sequence.tables = tables if index == 0 else tables.fork(self._memory.pool)
            self._scheduler.running.append(sequence)

    def refuse(self, arriving: Arriving) -> None:
        """A cache did not come: its room is free again."""
        self.arriving.remove(arriving)
        arriving.tables.release(self._memory.pool)
        self._scheduler.reconsider()

    def tables(self) -> list[Tables]:
        """All that is held here, for the integrity check."""
        return [o.tables for o in self.outbox.values()] + [a.tables for a in self.arriving]

    def _offer(self, sequence: Sequence, length: int) -> Outgoing:
        request, pool = sequence.request, self._memory.pool
        header = wire.header_of(self._lanes[request.lane].identity, sequence.held, length)
        tables = sequence.held.fork(pool)
        outgoing = Outgoing(request.id, header, tables, pool)
        self.outbox[request.id] = outgoing
        self.on_offer(outgoing)
        return outgoing
