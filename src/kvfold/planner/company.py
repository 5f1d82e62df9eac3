"""Workers that share a machine compute more slowly together than alone."""

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import simpy

from kvfold.planner.errors import PlacementError


@dataclass(frozen=True)
class Surroundings:
    """What requests and workers meet outside the engines, which a profile does not know.

    request_overhead: seconds of a request's way to a worker and its first token's way back (HTTP, tokenising,
    processes).
    slowdown: share by which a worker's steps take longer while another one computes.
    """

    request_overhead: float = 0.0
    slowdown: float = 0.0

    def __post_init__(self) -> None:
        for name in ("request_overhead", "slowdown"):
            if not 0 <= getattr(self, name) < math.inf:
                option = name.replace("_", "-")
                raise PlacementError(f"--{option} {getattr(self, name):g} is out of range; give a number of 0 or more")


class Company:
    """Who computes at present."""

    def __init__(self, env: simpy.Environment, slowdown: float) -> None:
        self._env, self._slowdown = env, slowdown
        self._computing = 0
        self._changed = env.event()

    def compute(self, seconds: float) -> Generator[simpy.Event, Any, None]:
        """Takes as long as a step that takes `seconds` alone."""
        if not self._slowdown:
            yield self._env.timeout(seconds)
            return
        self._come(1)
        while seconds > 0:
            speed = 1 / (1 + self._slowdown) if self._computing > 1 else 1.0
            since, end = self._env.now, self._env.timeout(seconds / speed)
            yield end | self._changed
            seconds = 0 if end.processed else seconds - (self._env.now - since) * speed
        self._come(-1)

    def _come(self, count: int) -> None:
        self._computing += count
        self._changed.succeed()
        self._changed = self._env.event()
