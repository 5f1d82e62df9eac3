"""The shapes of what the server says of itself, for /openapi.json."""

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, Field

from kvfold.engine.stats import WorkerStats


class State(BaseModel):
    """Whether requests are taken. reason: why not, null where they are; restarts: of the engine process."""

    status: Literal["starting", "ready", "restarting", "draining", "failed", "stopped"]
    reason: str | None
    restarts: int


class MethodFigures(BaseModel):
    """One KV cache method: bytes of its running sequences, and how many run and wait."""

    kv: str
    bytes: int
    dense_bytes: int
    compression: float
    running: int
    waiting: int


class PoolFigures(BaseModel):
    """Pages; cached: those that prefix snapshots alone hold, part of the used ones."""

    pages: int
    page_bytes: int
    used: int
    free: int
    cached: int


class PrefixFigures(BaseModel):
    """Prompt tokens looked up among prefix snapshots, and found there."""

    queried_tokens: int
    hit_tokens: int


class Percentiles(BaseModel):
    """Seconds, over the last minute; null where nothing happened."""

    p50: float | None
    p99: float | None


@dataclass(frozen=True)
class WorkerFigures(WorkerStats):
    """One worker of a cluster. offered: caches that wait to be fetched from it; expected: those that wait for room;
    arriving: those on their way; fetched, lost: those that arrived and did not, ever."""


class Roles(BaseModel):
    """How many workers of a cluster read prompts and give answers; without readers the others do both."""

    prefill: int = Field(ge=0)
    decode: int = Field(ge=1)


class Stats(State):
    """What the page charts. uptime: seconds; tokens and preemptions are totals since the engine started.
    workers: of a cluster, empty for a single engine."""

    model: str
    uptime: float
    methods: list[MethodFigures]
    pool: PoolFigures
    running: int
    waiting: int
    prompt_tokens: int
    generated_tokens: int
    preemptions: int
    prefix: PrefixFigures
    ttft: Percentiles
    workers: list[WorkerFigures]


class Pool(BaseModel):
    """The page pool in page order, some pages per cell. owner: -1 for a free cell, else the index of the method that
    holds most of it, `len(methods)` for prefix snapshots; filled: the share of its pages in use."""

    pages: int
    pages_per_cell: int
    methods: list[str]
    owner: list[int]
    filled: list[float]
