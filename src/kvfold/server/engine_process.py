"""The engine process: `python -m kvfold.server.engine_process ADDRESS OPTIONS`, started by the API process.

It computes and nothing else. It ends with the API process, and when told to by SIGTERM.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import zmq

from kvfold.config.progress import Advance
from kvfold.engine.engine import Engine
from kvfold.engine.handover import Arriving
from kvfold.engine.llm import LLM
from kvfold.engine.outputs import CompletionOutput, RequestOutput
from kvfold.errors import KvfoldError
from kvfold.kv.wire import Tail
from kvfold.server.messages import (
    Abort,
    Add,
    AskPool,
    Command,
    Event,
    Loading,
    Piece,
    PoolReport,
    Ready,
    Refused,
    Rejected,
    StatsReport,
    Update,
    Updates,
    decode_command,
    encode,
)

STATS_EVERY = 0.25  # seconds between reports while anything changes
IDLE_POLL = 1.0  # seconds between looks at whether the process that started this one lives


class Channel(Protocol):
    """Where an engine's commands come from and its events go."""

    def receive(self, timeout: float) -> Any | None:
        """The next command, within `timeout` seconds."""
        ...

    def send(self, event: Any) -> None: ...


class SocketChannel:
    """Commands and events over the pair of sockets."""

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        self._socket = socket

    def receive(self, timeout: float) -> Command | None:
        return decode_command(self._socket.recv()) if self._socket.poll(round(1000 * timeout)) else None

    def send(self, event: Event) -> None:
        self._socket.send(encode(event))


class EngineLoop:
    """Commands in, steps, events out."""

    def __init__(self, engine: Engine, channel: Channel) -> None:
        self._engine = engine
        self._channel = channel
        self._sent: dict[str, list[_Progress]] = {}
        self._parent = os.getppid()
        self._changed = True  # since the last report
        self._unchecked = False  # work was done since pages were last checked
        self._reported = 0.0

    def run(self) -> None:
        """Returns when the process that started this one is gone."""
        while os.getppid() == self._parent:
            self._before_step()
            if self._engine.has_unfinished:
                self._changed = self._unchecked = True
                updates = [self._update(output) for output in self._engine.step()]
                if updates:
                    self._channel.send(Updates(updates))
            idle = not self._engine.has_unfinished
            if self._changed and (idle or time.monotonic() - self._reported > STATS_EVERY):
                self._report()
                self._reported, self._changed = time.monotonic(), False
            if not self._receive(wait=idle or self._engine.stalled) and idle and self._unchecked:
                self._engine.check_integrity()
                self._unchecked = False

    def _before_step(self) -> None:
        """For loops that do more."""

    def _report(self) -> None:
        self._channel.send(StatsReport(self._engine.stats()))

    def _receive(self, wait: bool) -> int:
        """Handles every command that is there, and returns their number; with `wait`, waits a while for the first."""
        count, timeout = 0, IDLE_POLL if wait else 0.0
        while (command := self._channel.receive(timeout)) is not None:
            self._handle(command)
            count, timeout = count + 1, 0.0
        return count

    def _handle(self, command: Any) -> None:
        match command:
            case Add():
                self._add(command)
            case Abort():
                self._engine.abort(command.id)
                self._sent.pop(command.id, None)
                self._changed = True
            case AskPool():
                self._channel.send(PoolReport(self._engine.pool_map()))

    def _add(self, add: Add, arrived: tuple[Arriving, Tail] | None = None) -> None:
        outputs = add.outputs if arrived is None else arrived[1].outputs
        try:
            self._engine.add_request(
                add.prompt_token_ids,
                add.params,
                lane=add.lane,
                request_id=add.id,
                grammar=add.grammar,
                context=add.context,
                handover=add.handover,
                outputs=outputs,
                arrived=arrived,
            )
        except KvfoldError as error:
            self._channel.send(Rejected(add.id, type(error).__name__, str(error)))
            return
        self._sent[add.id] = [_Progress() for _ in range(add.params.n)]
        for progress, output in zip(self._sent[add.id], self._engine.outputs(add.id), strict=True):
            progress.piece(output)  # what was said elsewhere was sent from there

    def _update(self, output: RequestOutput) -> Update:
        sent = self._sent[output.request_id]
        pieces = [p for progress, o in zip(sent, output.outputs, strict=True) if (p := progress.piece(o))]
        if not output.finished:
            return Update(output.request_id, pieces)
        del self._sent[output.request_id]
        cached = output.metrics.cached_prompt_tokens
        return Update(output.request_id, pieces, True, output.kv, output.prompt_logprobs, cached)


class _Progress:
    """How much of one completion was sent."""

    def __init__(self) -> None:
        self.characters = 0
        self.tokens = 0
        self.finished = False

    def piece(self, output: CompletionOutput) -> Piece | None:
        """What is new since the last piece, None where nothing is."""
        if self.finished or (len(output.token_ids) == self.tokens and not output.finished):
            return None
        piece = Piece(
            output.index,
            output.text[self.characters :],
            output.token_ids[self.tokens :],
            None if output.logprobs is None else output.logprobs[self.tokens :],
            output.finish_reason,
            output.stop_reason,
        )
        self.characters, self.tokens, self.finished = len(output.text), len(output.token_ids), output.finished
        return piece


class SentProgress:
    """Tells whoever waits what long work is being done before the engine is ready."""

    def __init__(self, send: Callable[[Loading], None]) -> None:
        self._send = send

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Advance]:
        """See `kvfold.config.progress.Progress.task`."""
        done = 0

        def advance(n: int = 1) -> None:
            nonlocal done
            done += n
            self._send(Loading(description, done, total))

        advance(0)
        yield advance


def describe(llm: LLM) -> Ready:
    """What an engine says of itself."""
    spec, memory = llm.model.spec, llm.engine.memory
    longest = tuple(memory.longest(lane, spec.max_positions) for lane in range(len(llm.engine.lanes)))
    needs_context = tuple(lane.method.compress == "context" for lane in llm.engine.lanes)
    return Ready(str(llm.model.path), spec.max_positions, spec.vocab, spec.eos_token_ids, longest, needs_context)


def run_engine(address: str, options: dict[str, Any]) -> None:
    """Loads the model and serves until the API process is gone. options: the arguments of `LLM`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the API process decides what an interrupt means
    context = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.connect(address)
    try:
        llm = LLM(**options, progress=SentProgress(lambda loading: socket.send(encode(loading))))
    except KvfoldError as error:
        socket.send(encode(Refused(str(error))))
        socket.close(linger=1000)
        context.term()
        return
    socket.send(encode(describe(llm)))
    EngineLoop(llm.engine, SocketChannel(socket)).run()


if __name__ == "__main__":
    run_engine(sys.argv[1], json.loads(sys.argv[2]))
