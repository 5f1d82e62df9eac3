"""How fast memory is read, as JSON on stdout: {"1": bytes per second with one thread, "2": with two, ...}.

    python -m benchmarks.peers.bandwidth 2

A product of a float32 matrix that no cache holds with a vector: every element is read once, next to nothing is written,
as in a decode step; faster than torch's sums. The best of some passes, since whatever else runs only ever slows them.
"""

import json
import sys
import time
from collections.abc import Callable

import torch

BYTES = 2**29
COLUMNS = 2**13
PASSES = 12


def reader() -> Callable[[], float]:
    """A pass over memory that gives the bytes per second it read."""
    matrix, vector = torch.ones(BYTES // 4 // COLUMNS, COLUMNS), torch.ones(COLUMNS)

    def read() -> float:
        began = time.perf_counter()
        torch.mv(matrix, vector)
        return BYTES / (time.perf_counter() - began)

    return read


def measure(threads: int) -> float:
    torch.set_num_threads(threads)
    read = reader()
    return max(read() for _ in range(PASSES))


if __name__ == "__main__":
    most = int(sys.argv[1])
    print(json.dumps({str(threads): measure(threads) for threads in sorted({1, most})}))
