"""A server whose engine is a cluster, looked at from outside."""

import time
from collections.abc import Callable
from typing import Any

from tests.server.running import READY_SECONDS, RunningServer

Workers = list[dict[str, Any]]


def wait_workers(server: RunningServer, until: Callable[[Workers], bool]) -> Workers:
    """What /stats says of the workers, as soon as `until` is true of it."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        with server.client() as client:
            found: Workers = client.get("/stats").json()["workers"]
        if until(found):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


def wait_up(server: RunningServer, workers: int) -> Workers:
    """All workers are up and hold nothing that others should have fetched."""
    return wait_workers(server, lambda w: sum(x["up"] for x in w) == workers and not any(x["offered"] for x in w))


def wait_fetched(server: RunningServer, caches: int) -> Workers:
    """So many caches went from worker to worker."""
    return wait_workers(server, lambda w: sum(x["fetched"] for x in w) == caches)
