"""A cluster in one process: real engines, loops, TCP transports and router; workers are threads that can be killed."""

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from kvfold.cluster.members import WorkerGone
from kvfold.cluster.messages import decode_worker_command
from kvfold.cluster.options import ClusterOptions
from kvfold.cluster.router import Router
from kvfold.cluster.tcp import TcpTransport
from kvfold.cluster.worker import worker_ready
from kvfold.cluster.worker_loop import Inbox, WorkerLoop
from kvfold.engine.engine import Engine
from kvfold.engine.handover import Part
from kvfold.errors import TransferError
from kvfold.server.messages import Abort, Add, Ready, Rejected, Update, Updates, encode

SECRET = bytes(32)
PATIENCE = 60.0  # seconds for what takes one; a shared core may be slow


class Killed(BaseException):
    """Ends a worker's thread wherever it looks for commands."""


class FaultyTransport(TcpTransport):
    """Loses, damages or holds up caches with probability `faults`."""

    faults = 0.0
    random = random.Random(0)

    def fetch(self, address: str, request_id: str, sizes: Sequence[int]) -> Iterator[Part]:
        fault = self.random.choice(["cut", "damage", "stall"]) if self.random.random() < self.faults else None
        at = self.random.randrange(len(sizes) + 1)
        for number, part in enumerate(super().fetch(address, request_id, sizes)):
            if number == at and fault == "cut":
                raise TransferError("the line was cut")
            if number == at and fault == "damage":
                from kvfold.kv import wire

                damaged = part.copy()
                damaged[self.random.randrange(len(damaged))] ^= 1 << self.random.randrange(8)
                wire.check(damaged, wire.read_frame(wire.frame(number, part))[2])
            if number == at and fault == "stall":
                time.sleep(0.2)
                raise TransferError("the line was silent")
            yield part


class LocalWorker:
    """See `Link`. `engine` is to be looked at only while nothing runs."""

    def __init__(self, engine: Engine, transport: type[TcpTransport]) -> None:
        self.engine = engine
        self._loop = asyncio.get_running_loop()
        self._events: list[bytes] = []
        self._there = asyncio.Event()
        self.dead = False
        self.inbox = Inbox(self._deliver)
        self.transport = transport("127.0.0.1", engine.handovers.outbox.get, SECRET, timeout=10.0)
        positions, vocab = engine._spec.max_positions, engine._spec.vocab
        lanes = len(engine.lanes)
        ready = Ready("tiny", positions, vocab, (), (positions,) * lanes, (False,) * lanes)
        self._deliver(worker_ready(engine, ready, self.transport))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def send(self, command: bytes) -> None:
        self.inbox.put(decode_worker_command(command))

    async def receive(self) -> list[bytes]:
        await self._there.wait()
        if self.dead:
            raise WorkerGone("it was killed")
        self._there.clear()
        events, self._events = self._events, []
        return events

    async def ping(self) -> None:
        return

    def kill(self) -> None:
        """The engine ends at its next look for commands; nothing it says after this is heard."""
        self.dead = True
        self._there.set()
        self.inbox.put(Killed)
        self.transport.close()

    def _deliver(self, event: Any) -> None:
        data = encode(event)
        self._loop.call_soon_threadsafe(self._put, data)

    def _put(self, data: bytes) -> None:
        if not self.dead:
            self._events.append(data)
            self._there.set()

    def _run(self) -> None:
        receive = self.inbox.receive

        def look(timeout: float) -> Any:
            command = receive(min(timeout, 0.05))
            if command is Killed or self.dead:
                raise Killed
            return command

        self.inbox.receive = look  # type: ignore[method-assign]
        try:
            WorkerLoop(self.engine, self.inbox, self.transport).run()
        except Killed:
            return


class Cluster:
    """A router and its workers; `ask` is what a client sees."""

    def __init__(self, options: ClusterOptions, make: Callable[[], Engine], transport: type[TcpTransport]) -> None:
        self.workers: dict[str, LocalWorker] = {}
        self.all: list[LocalWorker] = []
        self._make = make
        self._transport = transport
        self._answers: dict[str, asyncio.Queue[Any]] = {}
        self.ready = asyncio.Event()
        self.router = Router(options, [lane.label for lane in make().lanes], self._spawn, self._deliver)

    async def _spawn(self, name: str, number: int) -> LocalWorker:
        worker = LocalWorker(self._make(), self._transport)
        self.workers[name] = worker
        self.all.append(worker)
        return worker

    def _deliver(self, event: Any) -> None:
        match event:
            case Updates():
                for update in event.updates:
                    self._answers[update.id].put_nowait(update)
            case Rejected():
                self._answers[event.id].put_nowait(event)
            case Ready():
                self.ready.set()

    async def ask(self, add: Add, tokens: list[list[int]] | None = None) -> list[list[int]] | Rejected:
        """Token ids of all completions, or the refusal. tokens: filled as they come."""
        said = [[] for _ in range(add.params.n)] if tokens is None else tokens
        async for event in self.events(add):
            if isinstance(event, Rejected):
                return event
            for piece in event.pieces:
                said[piece.index] += piece.token_ids
        return said

    async def events(self, add: Add, patience: float = PATIENCE) -> AsyncIterator[Update | Rejected]:
        """What is said of a request, until it has ended."""
        queue = self._answers[add.id] = asyncio.Queue()
        self.router.handle(add)
        ended = False
        while not ended:
            event = await asyncio.wait_for(queue.get(), patience)
            ended = isinstance(event, Rejected) or event.finished
            yield event

    def cancel(self, request_id: str) -> None:
        self.router.handle(Abort(request_id))

    async def check_nothing_is_left(self) -> None:
        """No worker holds anything but prefix snapshots, and pages agree with their tables."""
        deadline = time.monotonic() + PATIENCE
        alive = [w for w in self.workers.values() if not w.dead]
        while any(w.engine.has_unfinished or w.engine.handovers.tables() for w in alive):
            assert time.monotonic() < deadline, "something is held"
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.06)
        for worker in alive:
            worker.engine.check_integrity()
        assert not self.router._jobs
        assert not self.router._keys
        assert not any(m.jobs for m in self.router.members)


@asynccontextmanager
async def cluster(
    make: Callable[[], Engine], transport: type[TcpTransport] = TcpTransport, **options: Any
) -> AsyncIterator[Cluster]:
    """A cluster whose workers are ready."""
    made = Cluster(ClusterOptions(**{"stall_seconds": 10.0, **options}), make, transport)
    running = asyncio.create_task(made.router.run())
    try:
        await asyncio.wait_for(made.ready.wait(), PATIENCE)
        yield made
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        for worker in made.all:
            if not worker.dead:
                worker.kill()
