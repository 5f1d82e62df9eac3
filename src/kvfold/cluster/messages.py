"""What the router and its workers tell each other, beside what an engine process understands anyway."""

import msgspec

from kvfold.engine.stats import EngineStats
from kvfold.kv.wire import Identity
from kvfold.server.messages import Abort, Add, AskPool, Loading, PoolReport, Ready, Refused, Rejected, Updates


class Fetch(msgspec.Struct, tag=True, frozen=True):
    """Fetch the cache of a request from the worker at `source`, when there is room for it, and go on with `add`."""

    add: Add
    source: str
    header: bytes


class Release(msgspec.Struct, tag=True, frozen=True):
    """The cache of a request was fetched, or nobody wants it any more: free its pages."""

    id: str


class Offer(msgspec.Struct, tag=True, frozen=True):
    """A prompt's cache can be fetched, though its last parts may still be computed. nbytes: of pages."""

    id: str
    header: bytes
    nbytes: int


class Fetched(msgspec.Struct, tag=True, frozen=True):
    """A cache has arrived whole. nbytes: that crossed the wire, frames included."""

    id: str
    nbytes: int
    seconds: float


class Lost(msgspec.Struct, tag=True, frozen=True):
    """A cache did not arrive."""

    id: str
    reason: str


class WorkerReady(msgspec.Struct, tag=True, frozen=True):
    """A worker's engine is ready. version: kvfold's; identities: of its lanes; address: where others fetch caches from
    it; token_bytes: KV bytes of a long prompt's token, for each lane; kv_memory: bytes of its pool."""

    ready: Ready
    version: str
    identities: tuple[Identity, ...]
    address: str
    token_bytes: tuple[float, ...]
    kv_memory: int


class WorkerReport(msgspec.Struct, tag=True, frozen=True):
    """Sent every fraction of a second while anything changes. offered: caches that others are to fetch, and bytes of
    their pages; waiting: caches that there is no room for yet; arriving: those on their way."""

    stats: EngineStats
    offered: int = 0
    offered_bytes: int = 0
    waiting: int = 0
    arriving: int = 0


WorkerCommand = Add | Abort | AskPool | Fetch | Release
WorkerEvent = Loading | WorkerReady | Refused | Rejected | Updates | WorkerReport | PoolReport | Offer | Fetched | Lost

_commands: msgspec.msgpack.Decoder[WorkerCommand] = msgspec.msgpack.Decoder(WorkerCommand)
_events: msgspec.msgpack.Decoder[WorkerEvent] = msgspec.msgpack.Decoder(WorkerEvent)


def decode_worker_command(data: bytes) -> WorkerCommand:
    """Raises msgspec.ValidationError for anything else."""
    return _commands.decode(data)


def decode_worker_event(data: bytes) -> WorkerEvent:
    """Raises msgspec.ValidationError for anything else."""
    return _events.decode(data)
