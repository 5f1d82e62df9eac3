"""Replays requests through a placement of simulated engines: queues, steps, page memory, handovers.

A discrete-event simulation in the manner of DistServe's (arXiv 2401.09670, section 4). Where that one has transfers
that cost nothing, a fixed decode memory and latencies tested apart, this one has bytes on a link, the layout's own
pages, a decode side that pulls only what it has memory for, and prefill pages that stay until they have been pulled.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any

import simpy

from kvfold.benchmark.trace import TraceRequest
from kvfold.planner.document import EngineLimits, MethodProfile
from kvfold.planner.pages import PageArithmetic
from kvfold.planner.placement import Link, Placement
from kvfold.planner.records import Limits, RequestRecord, SimulationResult
from kvfold.planner.scheduler import SimSequence
from kvfold.planner.worker import Worker
from kvfold.planner.workload import check_memory

Process = Generator[simpy.Event, Any, None]


def simulate(
    requests: Sequence[TraceRequest],
    placement: Placement,
    method: MethodProfile,
    limits: EngineLimits,
    kv_memory: int,
    link: Link | None = None,
    *,
    stop_at: tuple[Limits, int] | None = None,
    on_step: Callable[[int, float, list[tuple[SimSequence, int]]], None] | None = None,
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
    run = _Simulation(requests, placement, method, limits, kv_memory, arithmetic, link or Link(), stop_at, on_step)
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
        stop_at: tuple[Limits, int] | None,
        on_step: Callable[[int, float, list[tuple[SimSequence, int]]], None] | None,
    ) -> None:
        self.env = simpy.Environment()
        self.over = self.env.event()
        self.left = len(requests)
        self.missed: set[int] = set()
        self.stop_at = stop_at
        self.link, self.transfer, self.arithmetic = link, method.transfer, arithmetic
        pages = kv_memory // arithmetic.page_bytes

        def worker(number: int, after_prompt: Callable[[Worker, SimSequence], None] | None) -> Worker:
            told = None if on_step is None else lambda step: on_step(number, self.env.now, step)
            return Worker(self.env, number, method.latency, limits, arithmetic, pages, self._note, after_prompt, told)

        self.mixed = [worker(n, None) for n in range(placement.mixed)]
        self.prefill = [worker(n, self._hand_over) for n in range(placement.prefill)]
        self.decode = [worker(placement.prefill + n, None) for n in range(placement.decode)]
        self.workers = [*self.mixed, *self.prefill, *self.decode]
        # A worker sends to one other at a time, and receives from one: its port has one rate each way.
        self.ports = {w.number: simpy.Resource(self.env) for w in self.prefill}
        self.handed: dict[int, deque[tuple[Worker, SimSequence]]] = {w.number: deque() for w in self.decode}
        self.sequences = [self._sequence(i, request, pages) for i, request in enumerate(requests)]

    def result(self, prompts_read: bool) -> SimulationResult:
        self.env.process(self._arrive(self._enter_read if prompts_read else self._enter))
        for worker in self.decode:
            self.env.process(self._pull(worker))
        self.env.run(until=self.over)
        complete = not self.left
        for worker in self.workers if complete else ():
            if worker.memory.in_use or worker.scheduler.waiting or worker.scheduler.running:
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

    def _sequence(self, index: int, request: TraceRequest, pages: int) -> SimSequence:
        # As the engine does it: an output that all of the memory could not hold is cut.
        whole = request.input_tokens + request.output_tokens
        limit = self.arithmetic.longest(pages, whole, request.input_tokens)
        outputs = limit - request.input_tokens
        # A prefill worker generates one token.
        return SimSequence(
            index, request.at, request.input_tokens, outputs, request.input_tokens + 1 if self.prefill else limit
        )

    def _arrive(self, enter: Callable[[SimSequence], None]) -> Process:
        for sequence in sorted(self.sequences, key=lambda s: s.at):
            if sequence.at > self.env.now:
                yield self.env.timeout(sequence.at - self.env.now)
            enter(sequence)

    def _enter(self, sequence: SimSequence) -> None:
        worker = _least_loaded(self.mixed or self.prefill)
        sequence.prefill_worker = sequence.decode_worker = worker.number
        worker.add(sequence)

    def _enter_read(self, sequence: SimSequence) -> None:
        sequence.computed, sequence.generated, sequence.first = sequence.prompt, 1, self.env.now
        if sequence.outputs == 1:
            sequence.last = self.env.now
        else:
            self._hand_over(self.prefill[0], sequence)
        self._note(sequence)

    def _hand_over(self, source: Worker, sequence: SimSequence) -> None:
        """A prompt has been read: a decode worker is to pull it, and until then its pages stay."""
        target = _least_loaded(self.decode, lambda w: sum(s.pages for _, s in self.handed[w.number]))
        sequence.handed = self.env.now
        sequence.limit = sequence.prompt + sequence.outputs
        sequence.decode_worker = target.number
        self.handed[target.number].append((source, sequence))
        target.notify()

    def _pull(self, worker: Worker) -> Process:
        """Brings what was handed over to a decode worker, in order, as soon as it has memory and place."""
        queue = self.handed[worker.number]
        while True:
            while not queue or not worker.can_take(queue[0][1]):
                yield worker.changed()
            source, sequence = queue.popleft()
            source_pages, sequence.pages = sequence.pages, 0
            worker.expect(sequence)
            with self.ports[source.number].request() as port:
                yield port
                sequence.wire_bytes = self.arithmetic.wire_bytes(sequence.computed, sequence.prompt)
                size = sequence.wire_bytes
                yield self.env.timeout(self.link.seconds(size) + self.transfer.seconds(size))
            source.give_back(source_pages)
            sequence.pulled = self.env.now
            if self.link.first_token == "pull":
                sequence.first = self.env.now
                self._check(sequence)
            worker.receive(sequence)

    def _note(self, sequence: SimSequence) -> None:
        """A first or a last token has come."""
        self.left -= sequence.last is not None
        if sequence.last is not None or not self.prefill or self.link.first_token == "prefill":
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


def _least_loaded(workers: Sequence[Worker], also: Callable[[Worker], int] = lambda _: 0) -> Worker:
    """By bytes held and waited for; the first of equals."""
    return workers[0] if len(workers) == 1 else min(workers, key=lambda w: w.scheduler.load + also(w))


def _record(s: SimSequence) -> RequestRecord:
    times = (s.first, s.last, s.prefill_worker, s.decode_worker, s.handed, s.pulled, s.wire_bytes, s.preemptions)
    return RequestRecord(s.index, s.at, s.prompt, s.outputs, *times)
