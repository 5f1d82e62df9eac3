"""Who gets what: the choices of the cluster's router (`kvfold.cluster.members`), in tokens instead of bytes, because
all simulated workers have one method."""

from collections.abc import Sequence

from kvfold.engine.memory import GROWTH
from kvfold.engine.read_blocks import ReadBlocks
from kvfold.planner.prefix import Key
from kvfold.planner.scheduler import SimSequence


class Router:
    """Knows of each worker, by number, the tokens of what it was given and has not done, and the prompts that it has
    read, in blocks of `block` tokens."""

    def __init__(self, workers: int, block: int) -> None:
        self._block = block
        self._load = [0] * workers
        self._read: list[ReadBlocks[Key]] = [ReadBlocks() for _ in range(workers)]

    def reader(self, sequence: SimSequence, workers: Sequence[int]) -> int:
        """Who is done with a prompt first: what waits there, and what of the prompt is not there yet; the first of
        equals."""
        name, lengths = sequence.name, range(self._block, sequence.prompt + 1, self._block)
        blocks = [] if name is None else [name.prefix(length) for length in lengths]
        found = min(workers, key=lambda number: self._load[number] - self._read[number].known(blocks) * self._block)
        self._read[found].remember(blocks)
        return self._give(sequence, found)

    def writer(self, sequence: SimSequence, workers: Sequence[int]) -> int:
        """Who takes over a cache: the one with the least memory promised."""
        return self._give(sequence, min(workers, key=lambda number: self._load[number]))

    def done(self, sequence: SimSequence, number: int) -> None:
        """A worker has nothing more to do for a request."""
        self._load[number] -= sequence.prompt + GROWTH

    def _give(self, sequence: SimSequence, number: int) -> int:
        self._load[number] += sequence.prompt + GROWTH
        return number
