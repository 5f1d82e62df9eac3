"""What an engine is doing and has done: for metrics, dashboards and the map of its pool."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kvfold.engine.memory import KVMemory
from kvfold.engine.scheduler import Scheduler
from kvfold.engine.sequence import Sequence
from kvfold.kv.pool import Pages

FREE = -1  # the owner of a cell none of whose pages is in use


@dataclass(frozen=True)
class LaneStats:
    """One method's part. Bytes are those of running sequences, a page shared by several counted for each."""

    kv: str
    bytes: int = 0
    dense_bytes: int = 0
    running: int = 0
    waiting: int = 0

    @property
    def compression(self) -> float:
        """`dense_bytes / bytes`; 1.0 where nothing runs."""
        return self.dense_bytes / self.bytes if self.bytes else 1.0


@dataclass(frozen=True)
class WorkerStats:
    """One worker of a cluster, since its cluster began. offered: caches that others are to fetch from it, and bytes of
    their pages; expected: caches that wait for room here; arriving: those on their way. fetched: caches that arrived,
    bytes on the wire, seconds that took; lost: caches that did not arrive. requests: that it works on."""

    name: str
    role: Literal["prefill", "decode"]
    up: bool
    requests: int
    used_bytes: int
    kv_bytes: int
    offered: int
    offered_bytes: int
    expected: int
    arriving: int
    fetched: int
    fetched_bytes: int
    fetched_seconds: float
    lost: int
    restarts: int


@dataclass(frozen=True)
class EngineStats:
    """A moment of an engine. Pages are counted once however many hold them; `cached` ones, part of the `used`,
    belong to prefix snapshots alone and make room when needed. Tokens and preemptions are totals since the start:
    `evicted_tokens` went with snapshots, `dropped_tokens` (an average over heads) were dropped by methods.
    workers: of a cluster; the rest is then the sum over them."""

    pages: int = 0
    page_bytes: int = 0
    used: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    evicted_tokens: int = 0
    dropped_tokens: int = 0
    lanes: list[LaneStats] = field(default_factory=list)
    workers: list[WorkerStats] = field(default_factory=list)

    @property
    def running(self) -> int:
        """Sequences that hold pages."""
        return sum(lane.running for lane in self.lanes)

    @property
    def waiting(self) -> int:
        """Sequences that wait for memory or a place in the batch."""
        return sum(lane.waiting for lane in self.lanes)


@dataclass(frozen=True)
class PoolMap:
    """The pool in page order, some pages per cell. owner: the lane that holds most of a cell's pages in use, the
    number of lanes where snapshots do, FREE where none is; filled: the share of its pages in use."""

    pages: int
    pages_per_cell: int
    owner: list[int]
    filled: list[float]


def collect_stats(
    labels: list[str],
    scheduler: Scheduler,
    memory: KVMemory,
    dense_bytes: int,
    prompt_tokens: int,
    generated_tokens: int,
    dropped_tokens: int,
) -> EngineStats:
    """Counts what runs and waits. labels: of the lanes; dense_bytes: of one token in a 16-bit cache."""
    pool = memory.pool
    held = np.zeros(pool.n_pages, bool)
    lanes = []
    for index, label in enumerate(labels):
        running = _of_lane(scheduler.running, index)
        for sequence in running:
            held[sequence.held.pages()] = True
        lanes.append(
            LaneStats(
                label,
                sum(s.held.nbytes for s in running),
                dense_bytes * sum(s.computed for s in running),
                len(running),
                len(_of_lane(scheduler.waiting, index)),
            )
        )
    used = pool.n_pages - pool.free_pages
    return EngineStats(
        pool.n_pages,
        pool.page_bytes,
        used,
        used - int(held.sum()),
        prompt_tokens,
        generated_tokens,
        scheduler.preemptions,
        scheduler.prefix_queried_tokens,
        scheduler.prefix_hit_tokens,
        memory.evicted_tokens,
        dropped_tokens,
        lanes,
    )


def map_pool(scheduler: Scheduler, memory: KVMemory, most_cells: int = 1024) -> PoolMap:
    """Who holds which part of the pool, in at most `most_cells` cells."""
    pool, lanes = memory.pool, len(memory.layouts)
    per_cell = -(-pool.n_pages // most_cells)
    cells = -(-pool.n_pages // per_cell)
    owner = np.where(pool.references(np.arange(pool.n_pages, dtype=np.int32)) > 0, lanes, FREE)
    for sequence in scheduler.running:
        owner[sequence.held.pages()] = sequence.request.lane
    counts = _count(owner, lanes + 1, per_cell, cells)
    in_use = counts.sum(1)
    sizes = np.full(cells, per_cell)
    sizes[-1] = pool.n_pages - per_cell * (cells - 1)
    most = np.where(in_use > 0, counts.argmax(1), FREE)
    return PoolMap(pool.n_pages, per_cell, most.tolist(), (in_use / sizes).round(3).tolist())


def _count(owner: NDArray[np.int64], owners: int, per_cell: int, cells: int) -> NDArray[np.int64]:
    """Pages of each owner in each cell, [cells, owners]."""
    pages: Pages = np.flatnonzero(owner != FREE).astype(np.int32)
    flat = np.bincount(pages // per_cell * owners + owner[pages], minlength=cells * owners)
    return flat.reshape(cells, owners)


def _of_lane(sequences: Iterable[Sequence], lane: int) -> list[Sequence]:
    return [s for s in sequences if s.request.lane == lane]
