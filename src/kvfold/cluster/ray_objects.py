"""KV caches as Ray objects: Ray's object stores carry the parts from node to node."""

from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from kvfold.cluster.transport import checked, expected_size
from kvfold.engine.handover import Part
from kvfold.errors import TransferError

NAMESPACE = "kvfold"


class RayTransport:
    """Caches of this worker are fetched through the actor called `name`. timeout: seconds of silence to be had."""

    def __init__(self, name: str, timeout: float) -> None:
        self._name = name
        self._timeout = timeout

    @property
    def address(self) -> str:
        return self._name

    def fetch(self, address: str, request_id: str, sizes: Sequence[int]) -> Iterator[Part]:
        """See `Transport.fetch`."""
        get: Any = ray.get  # whose overloads know nothing of a generator's references
        try:
            worker: Any = ray.get_actor(address, namespace=NAMESPACE)
            objects: Iterator[Any] = worker.parts.options(num_returns="streaming").remote(request_id)
            for number in range(len(sizes) + 1):
                head, data = get(next(objects), timeout=self._timeout)
                _, checksum, is_error = expected_size(number, sizes, head)
                yield checked(data, checksum, is_error)
        except GetTimeoutError as error:
            raise TransferError(f"worker {address} was silent for {self._timeout:g} s; try again") from error
        except (RayError, StopIteration, ValueError) as error:
            raise TransferError(f"worker {address} is gone ({type(error).__name__}); try again") from error

    def close(self) -> None:
        """Ray forgets objects by itself."""
