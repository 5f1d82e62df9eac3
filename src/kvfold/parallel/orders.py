"""What is to be done, from rank 0 to the others, through the store that brought them together."""

import contextlib
import json
from datetime import timedelta
from typing import Any, Protocol

from kvfold.parallel.errors import ParallelError

KEPT = 64  # orders before those that all ranks have read are deleted from the store
IDLE = timedelta(days=1)  # a rank waits this long for something to do; that rank 0 has ended it notices at once

Order = dict[str, Any]


class Store(Protocol):
    """What is needed of torch's stores, all of which have it."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...
    def delete_key(self, key: str, /) -> bool: ...


class Orders:
    """Numbered orders; every rank reads each of them once. Raises ParallelError where the store is gone."""

    def __init__(self, store: Store, rank: int) -> None:
        self._store, self._rank = store, rank
        self._count = self._deleted = 0

    @property
    def full(self) -> bool:
        """Whether it is time to make sure that all have been read, and to `clear`."""
        return self._count - self._deleted >= KEPT

    def tell(self, order: Order) -> None:
        try:
            self._store.set(f"order/{self._count}", json.dumps(order))
        except RuntimeError as error:
            raise ParallelError("the ranks' store is gone; start all ranks again") from error
        self._count += 1

    def clear(self) -> None:
        """Deletes all orders; every rank must have read them."""
        for number in range(self._deleted, self._count):
            self._store.delete_key(f"order/{number}")
        self._deleted = self._count

    def heard_last(self) -> None:
        """Says that this rank has read the last order and needs the store no longer."""
        with contextlib.suppress(RuntimeError):  # rank 0 has waited long enough
            self._store.set(f"left/{self._rank}", "yes")

    def await_others(self, ranks: int, patience: float) -> None:
        """Waits until all other ranks have `heard_last`, because the store may end with this process; no longer than
        `patience` seconds."""
        with contextlib.suppress(RuntimeError):
            self._store.wait([f"left/{rank}" for rank in range(1, ranks)], timedelta(seconds=patience))

    def next(self) -> Order:
        """Waits for the next order."""
        key = f"order/{self._count}"
        try:
            self._store.wait([key], IDLE)
            order: Order = json.loads(self._store.get(key))
        except RuntimeError as error:
            raise ParallelError(
                f"rank {self._rank} lost rank 0; see what ended it, then start all ranks again"
            ) from error
        self._count += 1
        return order
