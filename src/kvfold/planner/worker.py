"""One simulated engine: it schedules a step, takes as long as the latency model says, and tokens have come."""

from collections.abc import Generator
from typing import Any, Protocol

import simpy

from kvfold.planner.company import Company
from kvfold.planner.document import EngineLimits
from kvfold.planner.latency import LatencyModel, StepWork, chunk_squares
from kvfold.planner.memory import Held, SimMemory
from kvfold.planner.pages import PageArithmetic
from kvfold.planner.scheduler import SimScheduler, SimSequence

Step = list[tuple[SimSequence, int]]


class Owner(Protocol):
    """Who hears of what a worker does, and in whose company it computes."""

    company: Company

    def between(self, worker: "Worker") -> None:
        """The next step is about to be scheduled."""
        ...

    def begins(self, worker: "Worker", step: Step, seconds: float) -> None:
        """A step begins, and how long it takes."""
        ...

    def read(self, worker: "Worker", sequence: SimSequence) -> bool:
        """A prompt is read and has its first token, not its last. Whether another worker goes on with it."""
        ...

    def note(self, sequence: SimSequence) -> None:
        """A first or a last token has come."""
        ...


class Worker:
    """`number` is its place among all workers."""

    def __init__(
        self,
        env: simpy.Environment,
        number: int,
        latency: LatencyModel,
        limits: EngineLimits,
        arithmetic: PageArithmetic,
        pages: int,
        owner: Owner,
    ) -> None:
        self.number = number
        self.steps = 0
        self.memory = SimMemory(pages)
        self.scheduler = SimScheduler(limits, arithmetic, self.memory)
        self._env, self._latency, self._arithmetic, self._owner = env, latency, arithmetic, owner
        self._wake = env.event()
        env.process(self._run())

    def add(self, sequence: SimSequence) -> None:
        """A request arrives."""
        self.scheduler.waiting.append(sequence)
        self.rouse()

    def receive(self, sequence: SimSequence, held: Held) -> None:
        """The pages of an expected sequence are here: it runs."""
        self.scheduler.arrive(sequence, held)
        self.rouse()

    def give_back(self, held: Held) -> None:
        """Pages of a sequence that another worker has pulled are free."""
        self.memory.resize(held, 0)
        self.scheduler.reconsider()
        self.rouse()

    def rouse(self) -> None:
        """There may be something to do."""
        if not self._wake.triggered:
            self._wake.succeed()

    def _run(self) -> Generator[simpy.Event, Any, None]:
        while True:
            self._owner.between(self)
            step = self.scheduler.schedule()
            if not step:
                self._wake = self._env.event()
                yield self._wake
                continue
            seconds = self._latency.seconds(self._work(step))
            self._owner.begins(self, step, seconds)
            yield from self._owner.company.compute(seconds)
            self._finish(step)

    def _work(self, step: Step) -> StepWork:
        tokens = squares = pages = batch = 0
        for sequence, count in step:
            if count == 1 and sequence.generated and sequence.computed == sequence.length - 1:
                pages += sequence.pages
                batch += 1
            else:
                tokens += count
                squares += chunk_squares(sequence.computed, count)
        return StepWork(tokens, squares, pages * self._arithmetic.page_bytes, batch)

    def _finish(self, step: Step) -> None:
        self.steps += 1
        for sequence, count in step:
            self.scheduler.advance(sequence, count)
        for sequence, _ in step:
            self.scheduler.snapshot(sequence)
        for sequence, _ in step:
            if sequence.computed == sequence.length:
                self._token(sequence)

    def _token(self, sequence: SimSequence) -> None:
        sequence.generated += 1
        now = self._env.now
        done = sequence.generated >= sequence.outputs
        if sequence.first is None:
            sequence.first = now
        if done:
            sequence.last = now
            self.scheduler.remember(sequence)
            self.scheduler.leave(sequence)
            self.scheduler.free(sequence)
        elif sequence.generated == 1 and self._owner.read(self, sequence):
            self.scheduler.leave(sequence)
        if done or sequence.generated == 1:
            self._owner.note(sequence)
