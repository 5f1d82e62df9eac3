"""The engine's scheduler over numbers of pages instead of pages: which tokens of which sequences run in a step.

Rule for rule `kvfold.engine.scheduler.Scheduler`, which a test holds it to; what differs is that no token is known, so
that prefixes are found by the names that a trace gives their blocks, if it does.
"""

from collections import deque
from dataclasses import dataclass, field

from kvfold.planner.document import EngineLimits
from kvfold.planner.memory import Held, SimMemory
from kvfold.planner.pages import PageArithmetic
from kvfold.planner.prefix import PromptName


@dataclass(eq=False, slots=True)
class SimSequence:
    """A request on its way. `limit`: tokens, prompt and output, at which it ends on the worker it is on.

    Times are seconds of the simulation. held: on the worker that it is on. name: of its prompt, where prefixes are
    cached; cached: tokens of the prompt that were.
    """

    index: int
    at: float
    prompt: int
    outputs: int
    limit: int
    generated: int = 0
    computed: int = 0
    held: Held = field(default_factory=Held)
    name: PromptName | None = None
    cached: int = 0
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

    @property
    def pages(self) -> int:
        return self.held.pages


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
            if not self._admit(entering):
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

    def expect(self, pages: int) -> Held | None:
        """Takes the memory for a sequence that comes with its pages; None where it has to wait for that, or for a
        place."""
        if self.running or self.arriving:
            taken = len(self.running) + self.arriving + 1
            if taken > self._limits.max_sequences or self._promised() + pages > self.memory.available:
                return None
        held = Held()
        if not self.memory.resize(held, pages):
            return None
        self.arriving += 1
        return held

    def arrive(self, sequence: SimSequence, held: Held) -> None:
        """An expected sequence is here: it runs."""
        self.arriving -= 1
        sequence.held = held
        self.start(sequence)

    def start(self, sequence: SimSequence) -> None:
        sequence.running = True
        self.running.append(sequence)

    def advance(self, sequence: SimSequence, count: int) -> None:
        """The tokens of a step are computed: what windows and events left behind is free again."""
        sequence.computed += count
        self.memory.resize(sequence.held, self.arithmetic.held(sequence.computed, sequence.prompt))

    def snapshot(self, sequence: SimSequence) -> None:
        """Keeps a prompt at block boundaries and at its end."""
        computed, prompt = sequence.computed, sequence.prompt
        if computed == prompt or (computed % self._limits.prefix_block == 0 and computed < prompt):
            self.remember(sequence)

    def remember(self, sequence: SimSequence) -> None:
        """Keeps what a sequence holds for others with the same beginning."""
        if sequence.name is not None:
            computed, key = sequence.computed, None
            if computed <= sequence.prompt:
                key = sequence.name.prefix(computed)
            self.memory.snapshot(sequence.held, self.arithmetic.full(computed), key)
            self.reconsider()

    def leave(self, sequence: SimSequence) -> None:
        """Takes a running sequence out, with its pages."""
        sequence.running = False
        self.running.remove(sequence)

    def free(self, sequence: SimSequence) -> None:
        self.memory.resize(sequence.held, 0)
        self.reconsider()

    def reconsider(self) -> None:
        self._refused = None

    def _admit(self, sequence: SimSequence) -> bool:
        """Gives a waiting sequence what is known of its beginning, if all that runs, and it, fit for a while; a lone
        one always runs."""
        if sequence.name is not None:
            most = min(sequence.prompt, sequence.length - 1)  # the last token is computed for its logits
            sequence.held, sequence.computed = self.memory.match(most, sequence.name.prefix)
        more = max(0, self._wanted(sequence) - sequence.pages)
        if self.running and self._promised() + more > self.memory.available:
            self.memory.resize(sequence.held, 0)
            sequence.computed = 0
            return False
        if sequence.first is None:
            sequence.cached = sequence.computed
        return True

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
        return self.memory.resize(sequence.held, max(pages, sequence.pages))

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
