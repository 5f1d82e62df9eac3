"""One worker's engine loop: requests as in the engine process, and caches that leave and arrive."""

import queue
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import msgspec

from kvfold.cluster.messages import Fetch, Fetched, Lost, Offer, Release, WorkerReport
from kvfold.cluster.transport import Transport
from kvfold.engine.engine import Engine
from kvfold.engine.handover import FETCHES, Arriving, Outgoing
from kvfold.errors import KvfoldError, TransferError
from kvfold.kv import wire
from kvfold.server.engine_process import EngineLoop
from kvfold.server.messages import Abort, Rejected


class Inbox:
    """Commands for a worker's loop, and the ends of its fetches, from any thread; events go to `deliver`."""

    def __init__(self, deliver: Callable[[Any], None]) -> None:
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.put: Callable[[Any], None] = self._queue.put
        self.send = deliver

    def receive(self, timeout: float) -> Any | None:
        """The next command or end of a fetch, within `timeout` seconds."""
        try:
            return self._queue.get(timeout=timeout) if timeout else self._queue.get_nowait()
        except queue.Empty:
            return None


@dataclass(eq=False)
class _Incoming:
    """A cache on its way. `error` or `tail` once it has ended."""

    fetch: Fetch
    arriving: Arriving
    started: float = field(default_factory=time.monotonic)
    nbytes: int = 0
    cancelled: bool = False
    tail: wire.Tail | None = None
    error: str | None = None


class WorkerLoop(EngineLoop):
    """An engine that gives away and takes over caches."""

    def __init__(self, engine: Engine, inbox: Inbox, transport: Transport) -> None:
        super().__init__(engine, inbox)
        self._inbox = inbox
        self._transport = transport
        self._waiting: deque[tuple[Fetch, wire.Header]] = deque()  # for room
        self._incoming: list[_Incoming] = []
        self._threads = ThreadPoolExecutor(FETCHES, thread_name_prefix="kv fetch")
        engine.handovers.on_offer = self._offer

    def _handle(self, command: Any) -> None:
        self._changed = True
        match command:
            case Fetch():
                self._expect(command)
            case Release():
                self._engine.handovers.release(command.id)
            case _Incoming():
                self._arrived(command)
            case Abort():
                self._waiting = deque(w for w in self._waiting if w[0].add.id != command.id)
                for incoming in self._incoming:
                    # Its thread may still be writing to its pages.
                    incoming.cancelled |= incoming.fetch.add.id == command.id
                super()._handle(command)
            case _:
                super()._handle(command)

    def _before_step(self) -> None:
        self._make_room()

    def _report(self) -> None:
        offered = self._engine.handovers.outbox.values()
        sizes = [o.nbytes for o in offered]
        report = WorkerReport(self._engine.stats(), len(sizes), sum(sizes), len(self._waiting), len(self._incoming))
        self._channel.send(report)

    def _offer(self, outgoing: Outgoing) -> None:
        header = wire.pack(wire.HEADER, outgoing.header)
        self._channel.send(Offer(outgoing.request_id, header, outgoing.nbytes))

    def _expect(self, fetch: Fetch) -> None:
        try:
            self._waiting.append((fetch, wire.unpack_header(fetch.header)))
        except TransferError as error:
            self._reject(fetch, error)

    def _reject(self, fetch: Fetch, error: KvfoldError) -> None:
        self._channel.send(Rejected(fetch.add.id, type(error).__name__, str(error)))

    def _make_room(self) -> None:
        """Begins to fetch what there is room for, first come, first served."""
        while self._waiting and len(self._incoming) < FETCHES:
            fetch, header = self._waiting[0]
            try:
                arriving = self._engine.handovers.expect(header, fetch.add.lane, fetch.add.params.n)
            except KvfoldError as error:
                self._waiting.popleft()
                self._reject(fetch, error)
                continue
            if arriving is None:
                return
            self._waiting.popleft()
            incoming = _Incoming(fetch, arriving)
            self._incoming.append(incoming)
            self._threads.submit(self._fetch, incoming)

    def _fetch(self, incoming: _Incoming) -> None:
        """In a thread of its own: the cache's parts into its pages."""
        extents, pool = incoming.arriving.extents, self._engine.memory.pool
        sizes = [extents.most(layer) for layer in range(extents.layers)]
        try:
            parts = self._transport.fetch(incoming.fetch.source, incoming.fetch.add.id, sizes)
            for number, part in enumerate(parts):
                if incoming.cancelled:
                    raise TransferError("the request was cancelled")
                incoming.nbytes += len(part) + wire.FRAME_BYTES
                if number < extents.layers:
                    extents.write(pool, number, part)
                else:
                    incoming.tail = msgspec.msgpack.decode(part.tobytes(), type=wire.Tail)
        except (TransferError, msgspec.MsgspecError, ValueError) as error:
            incoming.error = str(error)
        except Exception as error:  # a defect: whoever waits must hear of it
            incoming.error = f"{type(error).__name__}: {error}"
        self._inbox.put(incoming)

    def _arrived(self, incoming: _Incoming) -> None:
        fetch, arriving = incoming.fetch, incoming.arriving
        self._incoming.remove(incoming)
        if incoming.error is None and incoming.tail is not None and not incoming.cancelled:
            seconds = time.monotonic() - incoming.started
            self._add(fetch.add, (arriving, incoming.tail))
            if arriving not in self._engine.handovers.arriving:
                self._channel.send(Fetched(fetch.add.id, incoming.nbytes, seconds))
                return
        self._engine.handovers.refuse(arriving)
        if not incoming.cancelled and incoming.error is not None:
            self._channel.send(Lost(fetch.add.id, incoming.error))
