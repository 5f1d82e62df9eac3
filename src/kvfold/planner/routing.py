"""Who gets what: the choices of the cluster's router (`kvfold.cluster.members`), in tokens instead of bytes, because
all simulated workers have one method."""

from collections.abc import Sequence

from kvfold.engine.memory import GROWTH
from kvfold.planner.scheduler import SimSequence


class Router:
    """Knows of each worker, by number, the tokens of what it was given and has not done."""

    def __init__(self, workers: int) -> None:
        self._load = [0] * workers

    def reader(self, sequence: SimSequence, workers: Sequence[int]) -> int:
        """Who is done with a prompt first; the first of equals."""
        return self._give(sequence, min(workers, key=lambda number: self._load[number]))

    def writer(self, sequence: SimSequence, workers: Sequence[int]) -> int:
        """Who takes over a cache: the one with the least memory promised."""
        return self._give(sequence, min(workers, key=lambda number: self._load[number]))

    def done(self, sequence: SimSequence, number: int) -> None:
        """A worker has nothing more to do for a request."""
        self._load[number] -= sequence.prompt + GROWTH

    def _give(self, sequence: SimSequence, number: int) -> int:
        self._load[number] += sequence.prompt + GROWTH
        return number
