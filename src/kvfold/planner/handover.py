"""A cache that crosses from the worker that read the prompt to the one that answers: which part may leave when."""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import simpy

from kvfold.planner.latency import TransferCost
from kvfold.planner.memory import Held
from kvfold.planner.placement import Link
from kvfold.planner.scheduler import SimSequence


@dataclass(eq=False)
class Handover:
    """sizes: bytes of each part. ready: when each can leave, but for the last one, which goes with the sampled token
    when `complete` has happened. source: who computed it; held: pages there; taken: where it goes."""

    sequence: SimSequence
    source: int
    sizes: tuple[int, ...]
    ready: tuple[float, ...]
    complete: simpy.Event
    held: Held = field(default_factory=Held)
    taken: Held = field(default_factory=Held)


def layers_ready(begin: float, seconds: float, parts: int) -> tuple[float, ...]:
    """When the layers of a step are computed, but for the last: each takes an equal share of the step."""
    return tuple(begin + seconds * (layer + 1) / parts for layer in range(parts - 1))


class Wire:
    """The ports of all workers, one rate each way.

    Caches that use a port at the same time take turns at it, part by part, as connections share a line.
    """

    def __init__(self, env: simpy.Environment, workers: int, link: Link, copying: TransferCost) -> None:
        self._env, self._link, self._copying = env, link, copying
        self._out, self._in = ([simpy.Resource(env) for _ in range(workers)] for _ in range(2))

    def carry(self, handover: Handover, target: int, arrived: Callable[[], None]) -> Generator[simpy.Event, Any, None]:
        """Brings all parts to a worker. What a handover costs beside its bytes comes with the last part: that is when
        the workers agree that it is there."""
        env, per_byte = self._env, 1 / self._copying.bytes_per_second + 8 / (self._link.gbps * 1e9)
        last = len(handover.sizes) - 1
        for number, size in enumerate(handover.sizes):
            if number == last:
                yield handover.complete
            elif handover.ready[number] > env.now:
                yield env.timeout(handover.ready[number] - env.now)
            overhead = self._link.overhead + self._copying.overhead if number == last else 0.0
            with self._out[handover.source].request() as leaving:
                yield leaving
                with self._in[target].request() as arriving:
                    yield arriving
                    yield env.timeout(overhead + size * per_byte)
        arrived()
