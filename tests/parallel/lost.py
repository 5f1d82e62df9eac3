"""`python -m tests.parallel.lost MODEL`: rank 0 of two, which says who the other is and then waits to be killed."""

import sys
import time

import psutil

from kvfold.parallel.launch import local_ranks
from kvfold.parallel.loading import ParallelConfig

if __name__ == "__main__":
    with local_ranks(ParallelConfig(2, sys.argv[1], "int8(recent=16)", 2**24)) as (group, _):
        group.prefill(list(range(1, 200)))
        print(psutil.Process().children()[0].pid, flush=True)
        time.sleep(600)
