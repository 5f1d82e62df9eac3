"""The workers of a cluster as its router sees them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvfold.cluster.messages import WorkerReady, WorkerReport
from kvfold.cluster.options import Role
from kvfold.config.engine import EngineConfig
from kvfold.engine.memory import GROWTH
from kvfold.engine.read_blocks import ReadBlocks
from kvfold.engine.stats import WorkerStats
from kvfold.kv.prefix import prefix_digests

Block = tuple[int, bytes]
"""A lane, and the digest of a prompt's first tokens up to a snapshot's length."""
PREFIX_BLOCK = EngineConfig.prefix_block  # workers' engines leave it as it is


class WorkerGone(Exception):
    """A worker's process has ended; never reaches a user."""


class Link(Protocol):
    """The way to one worker's process."""

    def send(self, command: bytes) -> None:
        """Never waits; what is sent to a process that has ended is lost."""
        ...

    async def receive(self) -> list[bytes]:
        """What happened since the last call, as soon as something has. Raises WorkerGone."""
        ...

    async def ping(self) -> None:
        """Returns when the process answers. Raises WorkerGone."""
        ...

    def kill(self) -> None: ...


@dataclass(eq=False)
class Member:
    """One worker. `jobs`: KV bytes that its requests will take, by their key; `link` and `ready` while it is there."""

    name: str
    role: Role
    link: Link | None = None
    ready: WorkerReady | None = None
    report: WorkerReport | None = None
    jobs: dict[str, float] = field(default_factory=dict)
    restarts: int = 0
    fetched: int = 0
    fetched_bytes: int = 0
    fetched_seconds: float = 0.0
    lost: int = 0
    read: ReadBlocks[Block] = field(default_factory=ReadBlocks)

    @property
    def load(self) -> float:
        """KV bytes of what it was given to do and has not done."""
        return sum(self.jobs.values())

    def gone(self) -> None:
        """Nothing that it knew is there any more."""
        self.link = self.ready = self.report = None
        self.read = ReadBlocks()

    def cost(self, lane: int, tokens: int) -> float:
        """KV bytes that a request of so many tokens takes here."""
        return (tokens + GROWTH) * (self.ready.token_bytes[lane] if self.ready else 0.0)

    def stats(self) -> WorkerStats:
        report, stats = self.report, None if self.report is None else self.report.stats
        return WorkerStats(
            self.name,
            self.role,
            self.ready is not None,
            len(self.jobs),
            0 if stats is None else stats.used * stats.page_bytes,
            0 if stats is None else stats.pages * stats.page_bytes,
            0 if report is None else report.offered,
            0 if report is None else report.offered_bytes,
            0 if report is None else report.waiting,
            0 if report is None else report.arriving,
            self.fetched,
            self.fetched_bytes,
            self.fetched_seconds,
            self.lost,
            self.restarts,
        )


def prefix_blocks(lane: int, tokens: Sequence[int]) -> list[Block]:
    """One for every whole block of a prompt and all before it."""
    lengths = range(PREFIX_BLOCK, len(tokens) + 1, PREFIX_BLOCK)
    return [(lane, digest) for digest in prefix_digests(tokens, lengths)]


def choose_reader(members: Sequence[Member], lane: int, tokens: int, blocks: Sequence[Block]) -> Member:
    """Who is done with a prompt first: the bytes that wait there, and those of the prompt that are not there yet."""

    def until_done(member: Member) -> float:
        fresh = tokens - member.read.known(blocks) * PREFIX_BLOCK
        return member.load + member.cost(lane, fresh)

    return min(members, key=until_done)


def choose_writer(members: Sequence[Member]) -> Member:
    """Whose memory is least full, counting what was promised."""
    return min(members, key=lambda member: member.load / (member.ready.kv_memory if member.ready else 1))
