"""How fast decode attention reads its cache, beside how fast this machine reads memory at all.

    python -m benchmarks.attention --kv "zeroc(bits=4)" --kv none --batch 8 --context 8192 --threads 1

All layers of one decode step over pages full of random codes, backends and a pass of `torch.mv` over memory in turns,
`--repetitions` times. One JSON line per method and backend; `bytes` are the pages of the sequences, `of_read` is how
fast they are read over how fast `torch.mv` reads, medians both.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.peers.bandwidth import reader
from kvfold import LLM
from kvfold.attention.base import Plan, SequenceStep
from kvfold.attention.choose import choose_backend
from kvfold.kv.layout import CacheLayout
from kvfold.kv.pool import PagePool
from kvfold.kv.tables import PageTables
from kvfold.model.spec import ModelSpec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--kv", action="append", required=True)
    parser.add_argument("--backend", action="append", help="cpu, cpu:avx2, reference, ...; may be repeated")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--calibration", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    read = reader()
    for kv in options.kv:
        llm = LLM(options.model, kv=kv, kv_memory=2**27, calibration=options.calibration)
        layout = llm.engine.lanes[0].layout
        if not isinstance(layout, CacheLayout):
            raise SystemExit(f"{kv} chooses its tokens while it runs; random pages say nothing of it")
        pool, steps = filled(layout, options.batch, options.context)
        names = options.backend or ["cpu"]
        plans = [choose_backend(name).plan(pool, layout, steps, 0.125) for name in names]
        size = sum(len(step.tables.pages()) for step in steps) * layout.page_bytes
        taken, rates = timed(plans, llm.model.decoder.spec, read, options)
        bandwidth = statistics.median(rates)
        for name, seconds in zip(names, taken, strict=True):
            median = statistics.median(seconds)
            row = {"kv": kv, "backend": name, "threads": options.threads, "bytes": size, "seconds": round(median, 4)}
            row |= {"best": round(min(seconds), 4), "gb_per_s": round(size / median / 1e9, 2)}
            row |= {"read_gb_per_s": round(bandwidth / 1e9, 2), "best_read": round(max(rates) / 1e9, 2)}
            print(json.dumps({**row, "of_read": round(size / median / bandwidth, 3)}))


def filled(layout: CacheLayout, batch: int, context: int) -> tuple[PagePool, list[SequenceStep[PageTables]]]:
    """Sequences of `context` tokens whose pages hold random bytes (small numbers where they are not codes)."""
    pool = PagePool(batch * layout.pages(context + 1), layout.page_bytes)
    pool.data.random_(0, 255)
    if layout.exact:
        pool.data.view(torch.bfloat16).normal_()
    steps = []
    for i in range(batch):
        tables = PageTables(layout)
        tables.reserve(pool, context)
        tables.length = context
        tables.reserve(pool, context + 1)
        pool.data[torch.from_numpy(tables.near).long().clamp(min=0).flatten()] = 60  # some number near 0
        steps.append(SequenceStep(tables, i, 1))
    return pool, steps


def timed(
    plans: list[Plan], spec: ModelSpec, read: Callable[[], float], options: argparse.Namespace
) -> tuple[list[list[float]], list[float]]:
    """Seconds of one step's attention, one list per plan, and what `read` gave; all take turns."""
    batch = options.batch
    q, k, v = (torch.randn(batch, n, spec.head_dim) for n in (spec.heads, spec.kv_heads, spec.kv_heads))
    seconds: list[list[float]] = [[] for _ in plans]
    rates = []
    for _ in range(options.repetitions):
        rates.append(read())
        for plan, own in zip(plans, seconds, strict=True):
            began = time.perf_counter()
            for layer in range(spec.n_layers):
                plan.attend(layer, q, k, v)
            own.append(time.perf_counter() - began)
    return seconds, rates


if __name__ == "__main__":
    main()
