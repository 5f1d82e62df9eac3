"""How the parts of a KV cache get from the worker that computed them to the one that goes on with them.

The receiver pulls. Whatever carries the bytes, they are the same: each part in its frame (`kvfold.kv.wire`), the layers
first, then the tail, each as soon as it is computed.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from kvfold.engine.handover import Outgoing, Part
from kvfold.errors import TransferError
from kvfold.kv import wire

Lookup = Callable[[str], Outgoing | None]
"""The cache of a request in this worker's outbox."""


class Transport(Protocol):
    """One worker's end. `address` is what other workers' `fetch` takes."""

    @property
    def address(self) -> str: ...

    def fetch(self, address: str, request_id: str, sizes: Sequence[int]) -> Iterator[Part]:
        """The layers' bytes, then the tail's, checked. sizes: the most bytes of each layer.

        Raises TransferError where the other worker is gone, is silent for too long, or sends something else.
        """
        ...

    def close(self) -> None: ...


def outgoing_parts(lookup: Lookup, request_id: str, timeout: float) -> Iterator[tuple[bytes, Part]]:
    """Frames and bytes of all parts of a cache, or of the sentence that says why there are no more."""
    try:
        outgoing = lookup(request_id)
        if outgoing is None:
            raise TransferError("the KV cache is no longer there; it is computed again")
        for number in range(outgoing.parts):
            part = outgoing.part(number, timeout)
            yield wire.frame(number, part), part
    except TransferError as error:
        message = np.frombuffer(str(error).encode(), np.uint8)
        yield wire.frame(wire.ERROR, message), message


def expected_size(number: int, sizes: Sequence[int], frame: bytes) -> tuple[int, int, bool]:
    """Size and checksum of the part that follows a frame, and whether it is an error's sentence.

    Raises TransferError for a frame that is not that of part `number`.
    """
    found, size, checksum = wire.read_frame(frame)
    if found == wire.ERROR and size <= 2**16:
        return size, checksum, True
    fits = size <= (sizes[number] if number < len(sizes) else wire.MOST_TAIL)
    if found != number or not fits:
        raise TransferError(f"part {found} of {size} bytes arrived in the place of part {number}; it is sent again")
    return size, checksum, False


def checked(data: Part, checksum: int, is_error: bool) -> Part:
    """The bytes if they are what was sent. Raises TransferError otherwise, and where they say what went wrong."""
    wire.check(data, checksum)
    if is_error:
        raise TransferError(data.tobytes().decode("utf-8", "replace"))
    return data
