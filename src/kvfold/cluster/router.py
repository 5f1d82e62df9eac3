"""Which worker does what: prompts to readers, caches to writers, and everything once more where a worker is lost.

    Add ─► reader (prefill) ─ Offer ─► router ─ Fetch ─► writer (decode) ◄══ pages ══ reader
           first token ─► client                        Fetched ─► router ─ Release ─► reader; further tokens ─► client

A request whose reader, writer or cache is lost is given to others with what it has said so far; since every worker is a
whole engine, one alone serves where there is only one.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from kvfold.cluster.job import Job
from kvfold.cluster.members import Link, Member, WorkerGone, choose_reader, choose_writer, prefix_blocks
from kvfold.cluster.messages import Fetch, Fetched, Lost, Offer, Release, WorkerReady, WorkerReport, decode_worker_event
from kvfold.cluster.options import ROLES, ClusterOptions
from kvfold.cluster.totals import total
from kvfold.engine.stats import PoolMap
from kvfold.errors import ClusterError, EngineDiedError, TransferError
from kvfold.server.engine_process import STATS_EVERY
from kvfold.server.messages import (
    Abort,
    Add,
    AskPool,
    Command,
    Loading,
    PoolReport,
    Ready,
    Refused,
    Rejected,
    SetRoles,
    StatsReport,
    Update,
    Updates,
    encode,
)

log = logging.getLogger("kvfold.cluster")

Spawn = Callable[[str, int], Awaitable[Link]]
"""Starts the process of a worker, by its name and number. Raises ClusterError."""
MOST_DELAY = 30.0  # seconds between two starts of a worker that keeps ending


class Router:
    """deliver: takes the events that an engine process would send. methods: of the lanes."""

    def __init__(
        self, options: ClusterOptions, methods: Sequence[str], spawn: Spawn, deliver: Callable[[Any], None]
    ) -> None:
        self._options = options
        self._methods = methods
        self._spawn = spawn
        self._deliver = deliver
        roles = [role for role in ROLES for _ in range(getattr(options, role))]
        self.members = [Member(f"worker-{number}", role) for number, role in enumerate(roles)]
        self._jobs: dict[str, Job] = {}  # by id
        self._keys: dict[str, Job] = {}  # by the key of the present attempt
        self._homeless: list[Job] = []  # that no worker is there for
        self._pools: dict[Member, PoolMap | None] | None = None
        self._announced = False
        self._changed = False

    async def run(self) -> None:
        """Starts the workers and keeps them running, until cancelled. Raises ClusterError where they cannot start."""
        async with asyncio.TaskGroup() as tasks:
            for number, member in enumerate(self.members):
                tasks.create_task(self._keep(member, number), name=member.name)
            tasks.create_task(self._report(), name="report")

    def handle(self, command: Command) -> None:
        """What the API process asks for."""
        self._changed = True
        match command:
            case Add():
                job = Job.of(command)
                self._jobs[command.id] = job
                self._dispatch(job)
            case Abort():
                job_there = self._jobs.get(command.id)
                if job_there is not None:
                    self._forget(job_there)
            case SetRoles():
                self._set_roles(command)
            case AskPool():
                self._pools = {member: None for member in self.members if member.ready is not None}
                for member in self._pools:
                    _send(member, AskPool())

    def _set_roles(self, roles: SetRoles) -> None:
        """Changes the roles of as few workers as possible, of those with the least to do."""
        for role, count in (("prefill", roles.prefill), ("decode", roles.decode)):
            having = sorted((m for m in self.members if m.role == role), key=lambda member: member.load)
            for member in having[: max(0, len(having) - count)]:
                member.role = "decode" if role == "prefill" else "prefill"
                log.info("worker %s is for %s now", member.name, member.role)

    async def _keep(self, member: Member, number: int) -> None:
        """Starts a worker's process whenever there is none."""
        ended_early = 0
        while True:
            try:
                link = await self._spawn(member.name, number)
                member.link = link
                async with asyncio.TaskGroup() as tasks:
                    watch = tasks.create_task(self._watch(link))
                    reading = tasks.create_task(self._read(member, link))
                    reading.add_done_callback(partial(_cancel, watch))
            except* WorkerGone as error:
                why = str(error.exceptions[0])
            was_ready = member.ready is not None
            ended_early = 0 if was_ready else ended_early + 1
            if ended_early > self._options.attempts:
                raise ClusterError(
                    f"worker {member.name} cannot be started ({why}); see its log in Ray's session folder"
                )
            log.warning("worker %s is gone (%s); it is started again", member.name, why)
            if member.link is not None:
                member.link.kill()  # it may only have been out of reach
            member.gone()
            member.restarts += 1
            self._changed = True
            if self._pools is not None:
                self._pools.pop(member, None)
            for job in [self._keys[key] for key in list(member.jobs) if key in self._keys]:
                self._again(job, f"worker {member.name} was lost ({why})")
            member.jobs.clear()
            await asyncio.sleep(min(MOST_DELAY, 2.0**ended_early - 1))

    async def _watch(self, link: Link) -> None:
        """Ends a process that no longer answers."""
        silence = self._options.stall_seconds
        while True:
            await asyncio.sleep(silence / 4)
            try:
                async with asyncio.timeout(silence):
                    await link.ping()
            except TimeoutError:
                link.kill()
                raise WorkerGone(f"it did not answer for {silence:g} s") from None

    async def _read(self, member: Member, link: Link) -> None:
        while True:
            for data in await link.receive():
                self._event(member, decode_worker_event(data))

    def _event(self, member: Member, event: Any) -> None:
        self._changed = True
        match event:
            case Updates():
                for update in event.updates:
                    self._update(member, update)
            case Offer():
                self._offered(event)
            case Fetched():
                member.fetched += 1
                member.fetched_bytes += event.nbytes
                member.fetched_seconds += event.seconds
                self._fetched(event)
            case Lost():
                member.lost += 1
                self._lost(event)
            case Rejected():
                self._rejected(event)
            case WorkerReport():
                member.report = event
            case PoolReport():
                self._pool(member, event.pool)
            case WorkerReady():
                self._ready(member, event)
            case Refused():
                raise ClusterError(event.message)
            case Loading():
                if not self._announced:
                    self._deliver(Loading(f"{member.name}: {event.what}", event.done, event.total))

    def _ready(self, member: Member, event: WorkerReady) -> None:
        others = [other.ready for other in self.members if other.ready is not None]
        for other in others:
            if event.version != other.version:
                raise ClusterError(
                    f"worker {member.name} runs kvfold {event.version}, others {other.version}; install one version"
                )
            for ours, theirs in zip(other.identities, event.identities, strict=True):
                try:
                    ours.check(theirs)
                except TransferError as error:
                    raise ClusterError(str(error)) from None
        member.ready = event
        log.info("worker %s is ready", member.name)
        if not self._announced and all(m.ready is not None for m in self.members):
            self._announced = True
            everyone = [m.ready.ready for m in self.members if m.ready is not None]
            longest = tuple(map(min, *(ready.longest for ready in everyone)))
            one = everyone[0]
            self._deliver(Ready(one.path, one.max_positions, one.vocab, one.eos_token_ids, longest, one.needs_context))
        homeless, self._homeless = self._homeless, []
        for job in homeless:
            self._dispatch(job)

    def _dispatch(self, job: Job) -> None:
        """Gives a request to a worker."""
        there = [m for m in self.members if m.ready is not None]
        readers, writers = ([m for m in there if m.role == role] for role in ("prefill", "decode"))
        if not there:
            self._homeless.append(job)
            return
        self._keys[job.key] = job
        lane, tokens = job.add.lane, job.tokens
        # Completions that have said different things are read by who goes on with them.
        apart = bool(readers and writers) and not (job.begun and job.add.params.n > 1)
        blocks = prefix_blocks(lane, job.add.prompt_token_ids)
        member = choose_reader(readers if apart else writers or readers, lane, tokens, blocks)
        member.read.remember(blocks)
        if apart:
            job.reader = member
        else:
            job.writer, job.told, job.fetched = member, True, True
        member.jobs[job.key] = member.cost(lane, tokens)
        _send(member, job.command(handover=job.reader is not None))

    def _offered(self, offer: Offer) -> None:
        job = self._keys.get(offer.id)
        if job is None or job.reader is None or job.reader.ready is None:
            return
        others = [m for m in self.members if m.ready is not None and m is not job.reader]
        writers = [m for m in others if m.role == "decode"] or others
        if not writers:
            self._again(job, "no worker is there to give the answer")
            return
        job.writer = choose_writer(writers)
        job.writer.jobs[job.key] = job.writer.cost(job.add.lane, job.tokens)
        _send(job.writer, Fetch(job.command(handover=False), job.reader.ready.address, offer.header))

    def _fetched(self, event: Fetched) -> None:
        job = self._keys.get(event.id)
        if job is not None and job.reader is not None:
            job.fetched = True
            _send(job.reader, Release(job.key))
            self._reader_done(job)

    def _lost(self, event: Lost) -> None:
        """A cache did not arrive. Where the answer ends with its first token it is gone for that, and the reader is
        about to say so."""
        job = self._keys.get(event.id)
        if job is not None and job.reader is not None and not job.told:
            job.lost = event.reason
        elif job is not None:
            self._again(job, event.reason)

    def _reader_done(self, job: Job) -> None:
        if job.reader is not None and job.fetched and job.told:
            job.reader.jobs.pop(job.key, None)
            job.reader = None

    def _update(self, member: Member, update: Update) -> None:
        job = self._keys.get(update.id)
        if job is None:
            return
        if member is job.writer and not job.told:
            job.early.append(update)
            return
        heard, moves = job.hear(update)
        if heard.pieces or heard.finished:
            self._deliver(Updates([heard]))
        if heard.finished:
            self._forget(job)
        elif moves and job.lost is not None:
            self._again(job, job.lost)
        elif moves:
            job.told = True
            early, job.early = job.early, []
            self._reader_done(job)
            for held in early:
                if job.writer is not None:
                    self._update(job.writer, held)

    def _rejected(self, event: Rejected) -> None:
        job = self._keys.get(event.id)
        if job is not None:
            self._forget(job)
            self._deliver(Rejected(job.add.id, event.error, event.message))

    def _again(self, job: Job, why: str) -> None:
        """Begins a request anew from what it has said, or gives it up."""
        self._withdraw(job)
        job.next_attempt()
        log.warning("request %s: %s", job.add.id, why)
        if job.attempt > self._options.attempts:
            self._jobs.pop(job.add.id, None)
            message = f"the request was lost {job.attempt} times, at last because {why}; send it again"
            self._deliver(Rejected(job.add.id, EngineDiedError.__name__, message))
        else:
            self._dispatch(job)

    def _forget(self, job: Job) -> None:
        self._withdraw(job)
        self._jobs.pop(job.add.id, None)
        if job in self._homeless:
            self._homeless.remove(job)

    def _withdraw(self, job: Job) -> None:
        """Nobody works on it any more, and nobody holds its cache."""
        self._keys.pop(job.key, None)
        for member in job.members():
            member.jobs.pop(job.key, None)
            _send(member, Abort(job.key))

    def _pool(self, member: Member, pool: PoolMap) -> None:
        if self._pools is None or member not in self._pools:
            return
        self._pools[member] = pool
        found = [p for p in self._pools.values() if p is not None]
        if len(found) == len(self._pools):
            self._pools = None
            owner, filled = ([x for p in found for x in getattr(p, name)] for name in ("owner", "filled"))
            self._deliver(PoolReport(PoolMap(sum(p.pages for p in found), found[0].pages_per_cell, owner, filled)))

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(STATS_EVERY)
            if self._changed:
                self._changed = False
                self._deliver(StatsReport(total(self.members, self._methods)))


def _cancel(task: asyncio.Task[None], _: asyncio.Task[None]) -> None:
    task.cancel()


def _send(member: Member, command: Any) -> None:
    if member.link is not None:
        member.link.send(encode(command))
