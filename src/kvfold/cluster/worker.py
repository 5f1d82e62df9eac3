"""A worker: one engine in a Ray actor."""

import asyncio
import logging
import os
import threading
from collections.abc import AsyncIterator
from typing import Any

import ray

from kvfold import __version__
from kvfold.cluster.collective import GlooTransport, NcclTransport
from kvfold.cluster.messages import WorkerReady, decode_worker_command
from kvfold.cluster.ray_objects import RayTransport
from kvfold.cluster.tcp import TcpTransport
from kvfold.cluster.transport import Transport, outgoing_parts
from kvfold.cluster.worker_loop import Inbox, WorkerLoop
from kvfold.engine.engine import Engine
from kvfold.engine.handover import Outgoing
from kvfold.engine.llm import LLM
from kvfold.errors import KvfoldError
from kvfold.server.engine_process import SentProgress, describe
from kvfold.server.messages import Ready, Refused, encode

log = logging.getLogger("kvfold.cluster")

LONG = 8192  # tokens of the sequence that a lane's bytes per token are taken from


class Worker:
    """What Ray runs in a process of its own: commands in through `send`, events out through `receive`.

    options: the arguments of `LLM`. transport: one of `TRANSPORTS`; secret, gbps, timeout: see `TcpTransport`.
    """

    def __init__(
        self,
        name: str,
        options: dict[str, Any],
        transport: str,
        secret: bytes,
        gbps: float | None,
        timeout: float,
    ) -> None:
        self._name = name
        self._options = options
        self._kind = transport
        self._secret, self._gbps = secret, gbps
        self._timeout = timeout
        self._events: list[bytes] = []
        self._there: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._outbox: dict[str, Outgoing] = {}
        self._inbox = Inbox(self._deliver)

    async def start(self) -> None:
        """Begins to load the model; events tell how it goes."""
        self._loop, self._there = asyncio.get_running_loop(), asyncio.Event()
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    async def send(self, command: bytes) -> None:
        """Takes a command."""
        self._inbox.put(decode_worker_command(command))

    async def receive(self) -> list[bytes]:
        """Everything that has happened since the last call, as soon as something has."""
        assert self._there is not None, "started first"
        await self._there.wait()
        self._there.clear()
        events, self._events = self._events, []
        return events

    async def ping(self) -> None:
        """Returns."""

    async def parts(self, request_id: str) -> AsyncIterator[tuple[bytes, Any]]:
        """A cache for another worker, part by part, as Ray objects."""
        found = outgoing_parts(self._outbox.get, request_id, self._timeout)
        while (part := await asyncio.to_thread(next, found, None)) is not None:
            yield part

    def _deliver(self, event: Any) -> None:
        """From the engine's thread."""
        assert self._loop is not None, "started first"
        self._loop.call_soon_threadsafe(self._put, encode(event))

    def _put(self, event: bytes) -> None:
        assert self._there is not None, "started first"
        self._events.append(event)
        self._there.set()

    def _run(self) -> None:
        try:
            llm = LLM(**self._options, progress=SentProgress(self._deliver))
            engine = llm.engine
            self._outbox = engine.handovers.outbox
            transport = self._transport()
        except KvfoldError as error:
            self._deliver(Refused(str(error)))
            return
        self._deliver(worker_ready(engine, describe(llm), transport))
        try:
            WorkerLoop(engine, self._inbox, transport).run()
        except BaseException:
            log.exception("the engine of worker %s failed", self._name)
        os._exit(1)  # without its engine this process is of no use; the router starts another one

    def _transport(self) -> Transport:
        if self._kind == "ray":
            return RayTransport(self._name, self._timeout)
        host = ray.util.get_node_ip_address()
        if self._kind in ("gloo", "nccl"):
            kind = NcclTransport if self._kind == "nccl" else GlooTransport
            return kind(host, self._outbox.get, self._secret, self._timeout)
        return TcpTransport(host, self._outbox.get, self._secret, self._gbps, self._timeout)


def worker_ready(engine: Engine, ready: Ready, transport: Transport) -> WorkerReady:
    """What a worker says of itself when it can be given work."""
    pool = engine.memory.pool
    sizes = tuple(layout.pages(LONG) * pool.page_bytes / LONG for layout in engine.memory.layouts)
    identities = tuple(lane.identity for lane in engine.lanes)
    return WorkerReady(ready, __version__, identities, transport.address, sizes, pool.n_pages * pool.page_bytes)
