"""What the API process and the engine process tell each other: msgpack over one pair of sockets."""

from dataclasses import dataclass
from typing import Any

import msgspec

from kvfold.engine.outputs import FinishReason, KVUsage, Logprob
from kvfold.engine.params import SamplingParams
from kvfold.engine.stats import EngineStats, PoolMap


@dataclass(frozen=True)
class EngineOptions:
    """What the engine process loads and how it runs: the arguments of `kvfold.LLM`."""

    model: str = "smollm2-135m"
    kv: tuple[str, ...] = ("none",)
    kv_memory: int = 2**30
    dtype: str = "auto"
    weights: str = "auto"
    kv_dtype: str = "auto"
    seed: int = 0
    calibration: str | None = None
    chunk: int = 256
    max_batch_tokens: int = 512
    max_sequences: int = 256
    prefix_caching: bool = True
    threads: int | None = None


class Add(msgspec.Struct, tag=True, frozen=True):
    """A request for the lane `lane`; grammar: a compiled one that every completion must follow; context: how many of
    the prompt's tokens a method with compress="context" compresses before it reads the others. handover, outputs: as in
    `Engine.add_request`."""

    id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    lane: int
    grammar: bytes | None = None
    context: int | None = None
    handover: bool = False
    outputs: list[list[int] | None] = []


class Abort(msgspec.Struct, tag=True, frozen=True):
    """Forget a request; unknown ids (it ended meanwhile) mean nothing."""

    id: str


class AskPool(msgspec.Struct, tag=True, frozen=True):
    """Send a PoolReport."""


class SetRoles(msgspec.Struct, tag=True, frozen=True):
    """So many of a cluster's workers read prompts and give answers from now on; what runs goes on where it is."""

    prefill: int
    decode: int


Command = Add | Abort | AskPool | SetRoles


class Loading(msgspec.Struct, tag=True, frozen=True):
    """What the engine process does before it is ready; `done` of `total` units (None: nobody knows)."""

    what: str
    done: int = 0
    total: int | None = None


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The model is loaded. path: its directory; max_positions: tokens of its longest sequence; longest: tokens of
    the longest sequence that the KV memory can hold, and whether it needs to be told where a prompt's context ends,
    for each lane."""

    path: str
    max_positions: int
    vocab: int
    eos_token_ids: tuple[int, ...]
    longest: tuple[int, ...]
    needs_context: tuple[bool, ...]


class Refused(msgspec.Struct, tag=True, frozen=True):
    """The engine process cannot start, for a reason the user can do something about."""

    message: str


class Rejected(msgspec.Struct, tag=True, frozen=True):
    """A request that can never be served. error: the name of its class in `kvfold.errors`."""

    id: str
    error: str
    message: str


class Piece(msgspec.Struct, tag=True, frozen=True, omit_defaults=True):
    """What one completion of a request gained in a step."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class Update(msgspec.Struct, tag=True, frozen=True, omit_defaults=True):
    """What a request gained in a step; `kv` and what follows only with its end."""

    id: str
    pieces: list[Piece]
    finished: bool = False
    kv: KVUsage | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    cached_prompt_tokens: int = 0


class Updates(msgspec.Struct, tag=True, frozen=True):
    """What all requests gained in one step."""

    updates: list[Update]


class StatsReport(msgspec.Struct, tag=True, frozen=True):
    """Sent every fraction of a second while anything changes."""

    stats: EngineStats


class PoolReport(msgspec.Struct, tag=True, frozen=True):
    """The answer to AskPool."""

    pool: PoolMap


Event = Loading | Ready | Refused | Rejected | Updates | StatsReport | PoolReport

_encoder = msgspec.msgpack.Encoder()
_commands: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_events: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


def encode(message: Any) -> bytes:
    """A command or event as bytes."""
    return _encoder.encode(message)


def decode_command(data: bytes) -> Command:
    """Raises msgspec.ValidationError for anything else."""
    return _commands.decode(data)


def decode_event(data: bytes) -> Event:
    """Raises msgspec.ValidationError for anything else."""
    return _events.decode(data)
