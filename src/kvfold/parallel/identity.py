"""What ranks must have in common before they exchange anything."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from kvfold import __version__
from kvfold.parallel.errors import ParallelError
from kvfold.parallel.wire import Wire

MOST_BYTES = 4096

_REMEDIES = {
    "version": "install the same kvfold everywhere",
    "model": "give all ranks the same model files",
    "method": "give all ranks the same --kv",
    "calibration": "give all ranks the same --calibration file",
    "numbers": "give all ranks the same --dtype and --weights",
    "exchange": "give all ranks the same --parallel and --wire-bits",
}


@dataclass(frozen=True)
class Identity:
    """model: fingerprint of the weights; method: as users write it; calibration: its checksum ("" without
    one); numbers: dtypes of activations, weights and cache; exchange: variant and bits on the wire."""

    model: str
    method: str
    calibration: str
    numbers: str
    exchange: str
    version: str = __version__

    def agree(self, wire: Wire, pages: int) -> list[int]:
        """Compares notes; returns the pages of KV memory that each rank has.

        Raises ParallelError, on all ranks alike, where they differ.
        """
        own = json.dumps({**asdict(self), "pages": pages}).encode()
        if len(own) > MOST_BYTES:
            raise ParallelError("the method string is too long to be compared between ranks; shorten it")
        told = [json.loads(each) for each in wire.gather(own, MOST_BYTES)]
        check_alike(told)
        return [int(each["pages"]) for each in told]


def check_alike(told: Sequence[dict[str, object]]) -> None:
    """Raises ParallelError naming the first rank that differs from rank 0 and in what."""
    for rank, each in enumerate(told[1:], 1):
        for name, remedy in _REMEDIES.items():
            if each.get(name) != told[0].get(name):
                theirs, ours = (str(x.get(name))[:40] or "none" for x in (each, told[0]))
                raise ParallelError(f"rank {rank} has {name} {theirs!r} and rank 0 has {ours!r}; {remedy}")
