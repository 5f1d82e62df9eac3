"""The API process's side of the engine process: starts it, talks to it, notices its end."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncGenerator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import zmq
import zmq.asyncio

from kvfold import errors
from kvfold.engine.stats import EngineStats, LaneStats, PoolMap
from kvfold.errors import EngineDiedError, EngineNotReadyError, KvfoldError
from kvfold.server.messages import (
    Abort,
    Add,
    AskPool,
    Command,
    EngineOptions,
    Event,
    Loading,
    PoolReport,
    Ready,
    Refused,
    Rejected,
    SetRoles,
    StatsReport,
    Update,
    Updates,
    decode_event,
    encode,
)

Status = Literal["starting", "ready", "restarting", "failed", "stopped"]
HEALTHY_SECONDS = 600.0  # after so long, an engine process that dies is no longer one that keeps dying
# glibc keeps freed tensors on its heap, where those of ever other sizes fragment it: large ones go back at once.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(4 * 2**20)}
STOP_SECONDS = 5.0  # before an engine process that does not end on SIGTERM is killed

log = logging.getLogger("kvfold.server")


@dataclass(frozen=True)
class Program:
    """What is started as the engine process: `python -m module ADDRESS OPTIONS RESTARTS`, options as JSON.

    restarts: times that it is started again before it is given up.
    """

    module: str
    options: dict[str, Any]
    restarts: int = 1


class EngineClient:
    """One engine process, started again where it dies, as often as its program says unless it was ready for long.

    program: what to start in its place, which speaks as it does.
    `status` and `reason` tell how it is; `ready` is what it said of itself when it was; `stats` its last report.
    """

    def __init__(self, options: EngineOptions, program: Program | None = None) -> None:
        self.status: Status = "starting"
        self.reason: str | None = "the model is being loaded"
        self.restarts = 0
        self.refusal: str | None = None  # why it could not even start: something that the user can mend
        self.ready: Ready | None = None
        self.stats = _nothing(options)
        self._options = options
        self._program = program or Program("kvfold.server.engine_process", asdict(options))
        self._ready_since = time.monotonic()
        self._streams: dict[str, asyncio.Queue[Update | KvfoldError]] = {}
        self._pool_waiters: list[asyncio.Future[PoolMap]] = []
        self._socket: zmq.asyncio.Socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    def start(self) -> None:
        """Starts the engine process and returns; `status` tells how it goes."""
        self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")

    async def wait_started(self) -> None:
        """Returns once the engine is ready or has failed."""
        while self.status in ("starting", "restarting"):
            self._changed.clear()
            await self._changed.wait()

    async def stop(self) -> None:
        """Ends the engine process; what still runs fails."""
        self._set("stopped", "the server is shutting down")
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
        if self._supervisor is not None:
            _, late = await asyncio.wait([self._supervisor], timeout=STOP_SECONDS)
            if late and self._process is not None:
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
                await self._supervisor

    async def stream(self, add: Add) -> AsyncGenerator[Update, None]:
        """What a request gains, step by step, until its end; closing the iterator early cancels the request.

        Raises EngineDiedError where the engine is not there or ends, and what the engine rejects the request with.
        """
        self._check_ready()
        queue: asyncio.Queue[Update | KvfoldError] = asyncio.Queue()
        self._streams[add.id] = queue
        ended = False
        try:
            self._send(add)
            while not ended:
                event = await queue.get()
                ended = isinstance(event, KvfoldError) or event.finished
                if isinstance(event, KvfoldError):
                    raise event
                yield event
        finally:
            if self._streams.pop(add.id, None) is not None and not ended and self.status == "ready":
                self._send(Abort(add.id))

    async def pool(self) -> PoolMap:
        """The map of the page pool, as it is after the step that runs now."""
        self._check_ready()
        waiter: asyncio.Future[PoolMap] = asyncio.get_running_loop().create_future()
        self._pool_waiters.append(waiter)
        self._send(AskPool())
        return await waiter

    def set_roles(self, prefill: int, decode: int) -> None:
        """Shares a cluster's workers out anew."""
        self._check_ready()
        self._send(SetRoles(prefill, decode))

    def _check_ready(self) -> None:
        if self.status != "ready":
            raise EngineNotReadyError(f"the engine is not ready ({self.status}): {self.reason}")

    def _send(self, command: Command) -> None:
        assert self._socket is not None, "an engine that is ready has a socket"
        self._socket.send(encode(command))  # without a high-water mark this never waits

    async def _supervise(self) -> None:
        try:
            await self._keep_running()
        except Exception as error:  # no folder for the socket, no memory for a process, ...
            log.exception("the engine process cannot be run")
            self._set("failed", f"the engine process cannot be run ({error})")
            self._fail_streams(f"the engine process cannot be run ({error})")

    async def _keep_running(self) -> None:
        attempts = 0
        while True:
            code = await self._run_process()
            if self.status == "stopped":
                self._fail_streams(self.reason or "")
                return
            why = _describe(code)
            log.error("%s with %d requests in flight", why, len(self._streams))
            if time.monotonic() - self._ready_since > HEALTHY_SECONDS:
                attempts = 0
            again = attempts < self._program.restarts and self.refusal is None
            if self.refusal is None:
                self._set(*(("restarting", f"{why}; it is being started again") if again else ("failed", why)))
            self._fail_streams(why)
            if not again:
                return
            attempts += 1
            self.restarts += 1

    async def _run_process(self) -> int:
        """From start to end of one engine process; returns its exit code."""
        self.stats = _nothing(self._options)
        with tempfile.TemporaryDirectory(prefix="kvfold-") as folder, zmq.asyncio.Context() as context:
            address = f"ipc://{Path(folder) / 'engine'}"
            socket = context.socket(zmq.PAIR)
            socket.set_hwm(0)
            socket.linger = 0
            socket.bind(address)
            self._socket = socket
            options = json.dumps(self._program.options)
            command = [sys.executable, "-m", self._program.module, address, options, str(self.restarts)]
            # A session of its own: Ctrl-C at the terminal is for the API process, which lets requests finish.
            self._process = await asyncio.create_subprocess_exec(
                *command, start_new_session=True, env=_ALLOCATOR | os.environ
            )
            reader = asyncio.create_task(self._read(socket), name="engine events")
            ended = asyncio.create_task(self._process.wait(), name="engine end")
            try:
                await asyncio.wait([ended, reader], return_when=asyncio.FIRST_COMPLETED)
                while not reader.done() and await socket.poll(0):  # what it said last
                    await asyncio.sleep(0)
                if reader.done():
                    log.error("an event of the engine cannot be read", exc_info=reader.exception())
                    self._process.kill()
                code = await ended
            finally:
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)
                self._socket = None
                socket.close()
                if self._process.returncode is None:
                    os.kill(self._process.pid, signal.SIGKILL)
            return code

    async def _read(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            self._handle(decode_event(await socket.recv()))

    def _handle(self, event: Event) -> None:
        match event:
            case Updates():
                for update in event.updates:
                    self._deliver(update.id, update)
            case Rejected():
                self._deliver(event.id, _rejection(event))
            case StatsReport():
                self.stats = event.stats
            case PoolReport():
                waiters, self._pool_waiters = self._pool_waiters, []
                for waiter in waiters:
                    if not waiter.done():
                        waiter.set_result(event.pool)
            case Loading():
                share = "" if event.total is None else f", {event.done} of {event.total}"
                self.reason = f"{event.what}{share}"
                log.info("engine: %s", self.reason)
            case Ready():
                self.ready = event
                self._ready_since = time.monotonic()
                self._set("ready", None)
                log.info("engine ready")
            case Refused():
                self.refusal = event.message
                self._set("failed", event.message)

    def _deliver(self, request_id: str, event: Update | KvfoldError) -> None:
        queue = self._streams.get(request_id)
        if queue is not None:  # else it was cancelled while this was under way
            queue.put_nowait(event)

    def _set(self, status: Status, reason: str | None) -> None:
        if self.status != "stopped":
            self.status, self.reason = status, reason
            self._changed.set()

    def _fail_streams(self, reason: str) -> None:
        for queue in self._streams.values():
            queue.put_nowait(EngineDiedError(f"the request was lost: {reason}"))
        waiters, self._pool_waiters = self._pool_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(EngineDiedError(reason))


def _nothing(options: EngineOptions) -> EngineStats:
    return EngineStats(lanes=[LaneStats(kv) for kv in options.kv])


def _rejection(event: Rejected) -> KvfoldError:
    kind: type[KvfoldError] = getattr(errors, event.error, KvfoldError)
    return kind(event.message)


def _describe(code: int) -> str:
    if code < 0:
        return f"the engine process was ended by {signal.Signals(-code).name}"
    return f"the engine process ended with exit code {code}"
