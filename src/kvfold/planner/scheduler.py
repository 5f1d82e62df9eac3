"""The engine's scheduler over numbers of pages instead of pages: which tokens of which sequences run in a step.

Rule for rule `kvfold.engine.scheduler.Scheduler`, which a test holds it to; what differs is that no token is known, so
that no prefix is ever found.
"""

from collections import deque
from dataclasses import dataclass

from kvfold.planner.document import EngineLimits
from kvfold.planner.pages import PageArithmetic


@dataclass(eq=False, slots=True)
class SimSequence:
    """A request on its way. `limit`: tokens, prompt and output, at which it ends on the worker it is on.

    Times are seconds of the simulation. pages: held on the worker that it is on.
    """

    index: int
    at: float
    prompt: int
    outputs: int
    limit: int
    generated: int = 0
    computed: int = 0
    pages: int = 0
    running: bool = False
    first: float | None = None
    last: float | None = None
    prefill_worker: int = 0
    decode_worker: int = 0
    handed: float | None = None  # when its prompt had been read
    pulled: float | None = None  # when all of its pages had been
    wire_bytes: int = 0
    preemptions: int = 0

    @property
    def length(self) -> int:
        return self.prompt + self.generated


class SimMemory:
    """Pages of one worker."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.in_use = 0
        self.peak = 0

    @property
    def free(self) -> int:
        return self.pages - self.in_use

    def resize(self, sequence: SimSequence, pages: int) -> bool:
        """Makes a sequence hold so many pages. False, and nothing changes, where they are not there."""
        taken = self.take(pages - sequence.pages)
        if taken:
            sequence.pages = pages
        return taken

    def take(self, pages: int) -> bool:
        """Takes pages, or gives back where the number is below 0."""
        if pages > self.free:
            return False
        self.in_use += pages
        self.peak = max(self.peak, self.in_use)
        return True


class SimScheduler:
    """First come, first served, by pages; when memory runs out the youngest running sequence is preempted."""

    def __init__(self, limits: EngineLimits, arithmetic: PageArithmetic, memory: SimMemory) -> None:
        self.waiting: deque[SimSequence] = deque()
        self.running: list[SimSequence] = []
        self.arriving = 0  # sequences whose pages are being pulled; their memory is taken
        self.preemptions = 0
        self.memory = memory
        self.arithmetic = arithmetic
        self._limits = limits
        self._refused: SimSequence | None = None
        self._free_then = 0

    def schedule(self) -> list[tuple[SimSequence, int]]:
        """Sequences and how many tokens of each the next step computes, their pages being reserved."""
        budget = self._limits.max_batch_tokens
        scheduled: list[tuple[SimSequence, int]] = []
        for sequence in list(self.running):
            if not budget:
                break
            if not sequence.running:
                continue  # preempted for an older one
            count = self._count(sequence, budget)
            if count and self._make_room(sequence, count):
                scheduled.append((sequence, count))
                budget -= count
        if self.memory.free > self._free_then:
            self.reconsider()
        while budget and self.waiting:
            entering = self.waiting[0]
            if entering is self._refused or not self.has_place:
                break
            if not self.admits(entering):
                self._refused, self._free_then = entering, self.memory.free
                break
            self.waiting.popleft()
            self.start(entering)
            count = self._count(entering, budget)
            if not self._reserve(entering, count):
                self._preempt(entering)
                self._refused, self._free_then = entering, self.memory.free
                break
            scheduled.append((entering, count))
            budget -= count
        return scheduled

    @property
    def has_place(self) -> bool:
        return len(self.running) < max(1, self._limits.max_sequences)

    def admits(self, sequence: SimSequence) -> bool:
        """Whether all that runs, and a sequence that holds nothing here, fit for a while; a lone one always runs."""
        return not self.running or self._promised() + self._wanted(sequence) <= self.memory.free

    def expect(self, pages: int) -> bool:
        """Takes the memory for a sequence that comes with its pages; False where it has to wait for that, or for a
        place."""
        if self.running or self.arriving:
            taken = len(self.running) + self.arriving + 1
            if taken > self._limits.max_sequences or self._promised() + pages > self.memory.free:
                return False
        if not self.memory.take(pages):
            return False
        self.arriving += 1
        return True

    def arrive(self, sequence: SimSequence, pages: int) -> None:
        """An expected sequence is here: it runs."""
        self.arriving -= 1
        sequence.pages = pages
        self.start(sequence)

    def start(self, sequence: SimSequence) -> None:
        sequence.running = True
        self.running.append(sequence)

    def advance(self, sequence: SimSequence, count: int) -> None:
        """The tokens of a step are computed: what windows and events left behind is free again."""
        sequence.computed += count
        self.memory.resize(sequence, self.arithmetic.held(sequence.computed, sequence.prompt))

    def leave(self, sequence: SimSequence) -> None:
        """Takes a running sequence out, with its pages."""
        sequence.running = False
        self.running.remove(sequence)

    def free(self, sequence: SimSequence) -> None:
        self.memory.resize(sequence, 0)
        self.reconsider()

    def reconsider(self) -> None:
        self._refused = None

    def _promised(self) -> int:
        """Pages that running sequences do not hold yet and will want."""
        return sum(max(0, self._wanted(s) - s.pages) for s in self.running)

    def _wanted(self, sequence: SimSequence) -> int:
        return self.arithmetic.wanted(sequence.length, sequence.limit, sequence.computed, sequence.prompt)

    def _count(self, sequence: SimSequence, budget: int) -> int:
        limits = self._limits
        end = min(sequence.length, sequence.computed + min(limits.chunk, budget))
        event = self.arithmetic.next_event(sequence.computed, sequence.prompt)
        if event is not None:
            end = min(end, event)
        elif limits.prefix_caching:
            aligned = end - end % limits.prefix_block
            end = aligned if aligned > sequence.computed else end
        return end - sequence.computed

    def _reserve(self, sequence: SimSequence, count: int) -> bool:
        pages = self.arithmetic.reserved(sequence.computed, sequence.computed + count, sequence.prompt)
        return self.memory.resize(sequence, max(pages, sequence.pages))

    def _make_room(self, sequence: SimSequence, count: int) -> bool:
        while not self._reserve(sequence, count):
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: SimSequence) -> None:
        self.leave(sequence)
        self.free(sequence)
        sequence.computed = 0
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(sequence)
