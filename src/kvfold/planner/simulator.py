"""Replays requests through a placement of simulated engines: queues, steps, page memory, handovers.

A discrete-event simulation in the manner of DistServe's (arXiv 2401.09670, section 4). Where that one has transfers
that cost nothing, a fixed decode memory and latencies tested apart, this one has bytes on a link, the layout's own
pages, layers that leave while later ones are computed, a decode side that pulls only what it has memory for, and
prefill pages that stay until they have been pulled.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import simpy

from kvfold.benchmark.trace import TraceRequest
from kvfold.engine.handover import FETCHES
from kvfold.planner.company import Company, Surroundings
from kvfold.planner.document import EngineLimits, MethodProfile
from kvfold.planner.handover import Handover, Wire, layers_ready
from kvfold.planner.memory import Held
from kvfold.planner.pages import PageArithmetic
from kvfold.planner.placement import Link, Placement
from kvfold.planner.prefix import name_prompts
from kvfold.planner.records import Limits, RequestRecord, SimulationResult
from kvfold.planner.routing import Router
from kvfold.planner.scheduler import SimSequence
from kvfold.planner.worker import Step, Worker
from kvfold.planner.workload import check_memory

Process = Generator[simpy.Event, Any, None]


def simulate(
    requests: Sequence[TraceRequest],
    placement: Placement,
    method: MethodProfile,
    limits: EngineLimits,
    kv_memory: int,
    link: Link | None = None,
    surroundings: Surroundings | None = None,
    *,
    stop_at: tuple[Limits, int] | None = None,
    on_step: Callable[[int, float, Step], None] | None = None,
    prompts_read: bool = False,
) -> SimulationResult:
    """What becomes of requests that arrive at their times.

    kv_memory: bytes of each worker. stop_at: latency limits and how many requests may miss them before the rest is not
    worth simulating. on_step: is told the worker, the time and the tokens of every step as it begins.
    prompts_read: requests arrive with their prompts read and one token, at the decode workers alone; a prefill worker
    only stands for where the pages come from (DistServe's Algorithm 1 looks at either side by itself).
    Raises PlacementError for a prompt that a worker's memory never holds.
    """
    arithmetic = method.pages(limits.chunk)
    check_memory(requests, arithmetic, kv_memory // arithmetic.page_bytes)
    around = link or Link(), surroundings or Surroundings()
    run = _Simulation(requests, placement, method, limits, kv_memory, arithmetic, *around, stop_at, on_step)
    return run.result(prompts_read)


class _Simulation:
    def __init__(
        self,
        requests: Sequence[TraceRequest],
        placement: Placement,
        method: MethodProfile,
        limits: EngineLimits,
        kv_memory: int,
        arithmetic: PageArithmetic,
        link: Link,
        surroundings: Surroundings,
        stop_at: tuple[Limits, int] | None,
        on_step: Callable[[int, float, Step], None] | None,
    ) -> None:
        self.env = simpy.Environment()
        self.over = self.env.event()
        self.left = len(requests)
        self.missed: set[int] = set()
        self.stop_at, self.on_step = stop_at, on_step
        self.link, self.arithmetic = link, arithmetic
        self.request_overhead = surroundings.request_overhead
        self.company = Company(self.env, surroundings.slowdown)
        self.pages = kv_memory // arithmetic.page_bytes
        self.readers = range(placement.prefill or placement.mixed)
        self.writers = range(placement.prefill, placement.workers)
        self.router = Router(placement.workers, limits.prefix_block)
        self.wire = Wire(self.env, placement.workers, link, method.transfer)
        self.offered: dict[int, Handover] = {}  # by request, until the prompt is read
        self.asked: dict[int, deque[Handover]] = {n: deque() for n in self.writers}  # to be pulled
        engine = method.latency, limits, arithmetic, self.pages
        self.workers = [Worker(self.env, number, *engine, self) for number in range(placement.workers)]
        self.sequences = [self._sequence(i, request) for i, request in enumerate(requests)]
        if limits.prefix_caching and arithmetic.layered and any(request.hash_ids for request in requests):
            for sequence, name in zip(self.sequences, name_prompts(requests), strict=True):
                sequence.name = name

    def result(self, prompts_read: bool) -> SimulationResult:
        self.env.process(self._arrive(self._enter_read if prompts_read else self._enter))
        self.env.run(until=self.over)
        complete = not self.left
        for worker in self.workers if complete else ():
            worker.memory.forget()
            if worker.memory.in_use or worker.memory.busy or worker.scheduler.waiting or worker.scheduler.running:
                raise AssertionError(f"worker {worker.number} ends with {worker.memory.in_use} pages in use")
        ends = [s.last for s in self.sequences if s.last is not None]
        return SimulationResult(
            tuple(map(_record, self.sequences)),
            tuple(w.memory.peak for w in self.workers),
            self.arithmetic.page_bytes,
            sum(w.steps for w in self.workers),
            sum(w.scheduler.preemptions for w in self.workers),
            max(ends, default=self.env.now),
            complete,
        )

    def _sequence(self, index: int, request: TraceRequest) -> SimSequence:
        # As the engine does it: an output that all of the memory could not hold is cut.
        whole = request.input_tokens + request.output_tokens
        limit = self.arithmetic.longest(self.pages, whole, request.input_tokens)
        return SimSequence(index, request.at, request.input_tokens, limit - request.input_tokens, limit)

    def _arrive(self, enter: Callable[[SimSequence], None]) -> Process:
        for sequence in sorted(self.sequences, key=lambda s: s.at):
            there = sequence.at + self.request_overhead
            if there > self.env.now:
                yield self.env.timeout(there - self.env.now)
            enter(sequence)

    def _enter(self, sequence: SimSequence) -> None:
        self._assign(sequence).add(sequence)

    def _assign(self, sequence: SimSequence) -> Worker:
        number = self.router.reader(sequence, self.readers)
        sequence.prefill_worker = sequence.decode_worker = number
        return self.workers[number]

    def _enter_read(self, sequence: SimSequence) -> None:
        sequence.computed, sequence.generated, sequence.first = sequence.prompt, 1, self.env.now
        source = self._assign(sequence)
        if sequence.outputs == 1:
            sequence.last = self.env.now
        else:
            self.read(source, sequence)
        self.note(sequence)

    def begins(self, worker: Worker, step: Step, seconds: float) -> None:
        """Prompts that a step completes are offered as it begins: layers leave while later ones are computed."""
        if self.on_step is not None:
            self.on_step(worker.number, self.env.now, step)
        if worker.number in self.writers or not self.arithmetic.layered:
            return
        for sequence, count in step:
            if sequence.computed + count == sequence.prompt and sequence.outputs > 1:
                self.offered[sequence.index] = self._offer(worker, sequence, seconds)

    def read(self, worker: Worker, sequence: SimSequence) -> bool:
        """Pages stay on a prefill worker until they have been pulled."""
        if worker.number in self.writers:
            return False
        handover = self.offered.pop(sequence.index, None) or self._offer(worker, sequence, 0.0)
        handover.held, sequence.held = sequence.held, Held()
        sequence.handed = self.env.now
        handover.complete.succeed()
        return True

    def _offer(self, source: Worker, sequence: SimSequence, seconds: float) -> Handover:
        sizes = self.arithmetic.parts(sequence.prompt, sequence.prompt)
        ready = layers_ready(self.env.now, seconds, len(sizes))
        handover = Handover(sequence, source.number, sizes, ready, self.env.event())
        sequence.wire_bytes = sum(sizes)
        sequence.decode_worker = self.router.writer(sequence, self.writers)
        self.asked[sequence.decode_worker].append(handover)
        self.workers[sequence.decode_worker].rouse()
        return handover

    def between(self, worker: Worker) -> None:
        """Begins to pull what there is room for, first come, first served."""
        queue = self.asked.get(worker.number)
        while queue and worker.scheduler.arriving < FETCHES:
            pages = self.arithmetic.held(queue[0].sequence.prompt, queue[0].sequence.prompt)
            taken = worker.scheduler.expect(pages)
            if taken is None:
                return
            handover = queue.popleft()
            handover.taken = taken
            self.env.process(self.wire.carry(handover, worker.number, partial(self._pulled, handover)))

    def _pulled(self, handover: Handover) -> None:
        sequence = handover.sequence
        self.workers[handover.source].give_back(handover.held)
        self.router.done(sequence, handover.source)
        sequence.pulled = self.env.now
        if self.link.first_token == "pull":
            sequence.first = self.env.now
            self._check(sequence)
        self.workers[sequence.decode_worker].receive(sequence, handover.taken)

    def note(self, sequence: SimSequence) -> None:
        """A first or a last token has come."""
        if sequence.last is not None:
            self.left -= 1
            self.router.done(sequence, sequence.decode_worker)
        if sequence.last is not None or sequence.handed is None or self.link.first_token == "prefill":
            self._check(sequence)
        if not self.left and not self.over.triggered:
            self.over.succeed()

    def _check(self, sequence: SimSequence) -> None:
        if self.stop_at is None:
            return
        limits, allowed = self.stop_at
        record = _record(sequence)
        if not record.in_time(limits) or (record.last is not None and not record.fluent(limits)):
            self.missed.add(sequence.index)
        if len(self.missed) > allowed and not self.over.triggered:
            self.over.succeed()


def _record(s: SimSequence) -> RequestRecord:
    times = (
        s.first,
        s.last,
        s.prefill_worker,
        s.decode_worker,
        s.handed,
        s.pulled,
        s.wire_bytes,
        s.preemptions,
        s.cached,
    )
    return RequestRecord(s.index, s.at, s.prompt, s.outputs, *times)
