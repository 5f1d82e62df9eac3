"""One simulated engine: it schedules a step, takes as long as the latency model says, and tokens have come."""

from collections.abc import Callable, Generator
from typing import Any

import simpy

from kvfold.planner.document import EngineLimits
from kvfold.planner.latency import LatencyModel, StepWork, chunk_squares
from kvfold.planner.pages import PageArithmetic
from kvfold.planner.scheduler import SimMemory, SimScheduler, SimSequence

Step = list[tuple[SimSequence, int]]


class Worker:
    """note: is told each sequence's first and last token. after_prompt: takes a sequence that has its first token and
    wants more, pages and all (None: it goes on here). told: hears of every step as it begins."""

    def __init__(
        self,
        env: simpy.Environment,
        number: int,
        latency: LatencyModel,
        limits: EngineLimits,
        arithmetic: PageArithmetic,
        pages: int,
        note: Callable[[SimSequence], None],
        after_prompt: Callable[["Worker", SimSequence], None] | None,
        told: Callable[[Step], None] | None,
    ) -> None:
        self.number = number
        self.steps = 0
        self.memory = SimMemory(pages)
        self.scheduler = SimScheduler(limits, arithmetic, self.memory)
        self._env, self._latency, self._arithmetic = env, latency, arithmetic
        self._note, self._after_prompt, self._told = note, after_prompt, told
        self._wake = env.event()
        self._changed = env.event()
        env.process(self._run())

    def add(self, sequence: SimSequence) -> None:
        """A request arrives."""
        self.scheduler.waiting.append(sequence)
        self._rouse()

    def can_take(self, sequence: SimSequence) -> bool:
        """Whether there is memory and place for a sequence that comes with its pages; who was preempted goes first."""
        scheduler = self.scheduler
        need = self._arithmetic.held(sequence.computed, sequence.prompt)
        return not scheduler.waiting and scheduler.has_place and need <= self.memory.free and scheduler.admits(sequence)

    def expect(self, sequence: SimSequence) -> None:
        """Takes the memory for a sequence that `can_take` allowed."""
        self.memory.resize(sequence, self._arithmetic.held(sequence.computed, sequence.prompt))
        self.scheduler.incoming.append(sequence)

    def receive(self, sequence: SimSequence) -> None:
        """The pages of an expected sequence are here: it runs."""
        self.scheduler.incoming.remove(sequence)
        self.scheduler.start(sequence)
        self._rouse()

    def give_back(self, pages: int) -> None:
        """Pages of a sequence that another worker has pulled are free."""
        self.memory.in_use -= pages
        self.scheduler.reconsider()
        self._rouse()

    def changed(self) -> simpy.Event:
        """Happens when memory may have become free here, or `notify` was called."""
        if self._changed.triggered:
            self._changed = self._env.event()
        return self._changed

    def notify(self) -> None:
        if not self._changed.triggered:
            self._changed.succeed()

    def _rouse(self) -> None:
        if not self._wake.triggered:
            self._wake.succeed()

    def _run(self) -> Generator[simpy.Event, Any, None]:
        while True:
            step = self.scheduler.schedule()
            if not step:
                self.notify()
                self._wake = self._env.event()
                yield self._wake
                continue
            if self._told is not None:
                self._told(step)
            yield self._env.timeout(self._latency.seconds(self._work(step)))
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
        free = self.memory.free
        for sequence, count in step:
            self.scheduler.advance(sequence, count)
            if sequence.computed == sequence.length:
                self._token(sequence)
        if self.memory.free > free:
            self.notify()

    def _token(self, sequence: SimSequence) -> None:
        sequence.generated += 1
        now = self._env.now
        done = sequence.generated >= sequence.outputs
        if sequence.first is None:
            sequence.first = now
        if done:
            sequence.last = now
            self.scheduler.leave(sequence)
            self.scheduler.free(sequence)
        elif self._after_prompt is not None:
            self.scheduler.leave(sequence)
            self._after_prompt(self, sequence)
        if done or sequence.generated == 1:
            self._note(sequence)
