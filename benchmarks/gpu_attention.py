"""Correctness and speed of attention, for `gpu.py`."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from gpu_cases import Held, Shape, layout_of, random_rows, replayed, seconds, summary
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kvfold.attention.base import SequenceStep
from kvfold.attention.reference import ReferenceBackend
from kvfold.attention.triton.backend import TritonBackend
from kvfold.attention.triton.tuning import Tuning
from kvfold.kv.pool import PagePool
from kvfold.kv.tables import PageTables

FORMATS = ("dense", "8", "4", "3", "2", "mixed", "int8", "kivi2")
CACHED = 2**29  # bytes that a timed run reads at least, far more than a GPU's L2 holds


def check(backend: TritonBackend, shape: Shape, lengths: Sequence[int], device: torch.device) -> list[dict[str, Any]]:
    """A chunk of each sequence, then single tokens, against the reference in float32; and the pages byte by byte."""
    rows = []
    for name in FORMATS:
        layout = layout_of(name, shape, 1)
        pages = sum(layout.most_pages(n + 2, n + 2) for n in lengths)
        pools = [PagePool(pages, layout.page_bytes, where) for where in (device, torch.device("cpu"))]
        for pool in pools:
            pool.data.zero_()
        tables = [[PageTables(layout) for _ in lengths] for _ in pools]
        worst = 0.0
        for counts in (list(lengths), [1] * len(lengths), [1] * len(lengths)):
            inputs = random_rows(sum(counts), shape, torch.bfloat16, device)
            firsts = [0, *itertools.accumulate(counts)]
            outs = []
            for own, pool, kind in zip(tables, pools, (backend, ReferenceBackend()), strict=True):
                for t, count in zip(own, counts, strict=True):
                    t.reserve(pool, t.length + count)
                steps = [SequenceStep(t, first, count) for t, first, count in zip(own, firsts, counts, strict=False)]
                plan = kind.plan(pool, layout, steps, shape.head_dim**-0.5)
                exact = kind is not backend
                outs.append(plan.attend(0, *(x.cpu().float() if exact else x for x in inputs)))
                for t, count in zip(own, counts, strict=True):
                    t.advance(pool, t.length + count)
            for got, expected in zip(*outs, strict=True):
                worst = max(worst, float((got.cpu().float() - expected).norm() / expected.norm()))
        different = int((pools[0].data.cpu() != pools[1].data).sum())
        rows.append(
            {
                "format": name,
                "relative_error": worst,
                "different_bytes": different,
                "ok": worst < 1e-2 and not different,
            }
        )
    return rows


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes per second, read and written, of the best of several copies."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(seconds(lambda: target.copy_(source), device, 10))


def tuned(shape: Shape, context: int, batch: int, device: torch.device) -> tuple[TritonBackend, list[dict[str, Any]]]:
    """The fastest of a few sizes of programs, for 4-bit codes and for numbers."""
    base = Tuning()
    planes = [(256, 2, 1), (256, 2, 2), (256, 2, 3), (256, 4, 1), (512, 4, 1), (512, 4, 2)]
    numbers = [(64, 4, 2), (64, 4, 3), (128, 4, 2), (128, 8, 2), (128, 4, 3)]
    rows = []
    best: dict[str, tuple[float, dict[str, int]]] = {}
    for name, sizes, fields in (
        ("4", planes, ("plane_keys", "plane_warps", "plane_stages")),
        ("dense", numbers, ("keys", "warps", "stages")),
    ):
        for size, programs in itertools.product(sizes, (512, 1024, 2048)):
            chosen = dict(zip(fields, size, strict=True)) | {"programs": programs}
            try:
                time = _decode_time(TritonBackend(replace(base, **chosen)), name, shape, context, batch, device, 7)
            except Exception as error:  # a size that does not fit this GPU must not end the run
                rows.append({"format": name, **chosen, "error": f"{type(error).__name__}: {error}"[:200]})
                continue
            rows.append({"format": name, **chosen, **time})
            if name not in best or time["median_s"] < best[name][0]:
                best[name] = time["median_s"], chosen
    merged: dict[str, int] = {}
    for _, (_, chosen) in sorted(best.items(), reverse=True):  # the number of programs: that of codes
        merged = chosen | merged if merged else dict(chosen)
    merged |= {"programs": best["4"][1]["programs"]} if "4" in best else {}
    return TritonBackend(replace(base, **merged)), rows


def decode(
    backend: TritonBackend, shape: Shape, cells: Sequence[tuple[int, int]], device: torch.device, repetitions: int
) -> Iterator[dict[str, Any]]:
    """Seconds per layer of one decoding step, for every (context, batch) and format, with torch's beside them."""
    for context, batch in cells:
        cell = (shape, context, batch, device, repetitions)
        for name in ("dense", "8", "4", "3", "2"):
            yield _safely(f"kvfold {name}", context, batch, partial(_decode_time, backend, name, *cell))
        for name in ("sdpa flash", "flex"):
            yield _safely(name, context, batch, partial(_torch_time, name, *cell))


def _safely(name: str, context: int, batch: int, run: Callable[[], dict[str, float]]) -> dict[str, Any]:
    row: dict[str, Any] = {"what": name, "context": context, "batch": batch}
    try:
        return row | run()
    except Exception as error:  # the other cells are still worth having
        return row | {"error": f"{type(error).__name__}: {error}"[:300]}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _layers(nbytes: float, device: torch.device) -> int:
    return 1 if device.type == "cpu" else max(1, min(32, int(-(-CACHED // nbytes))))


def _decode_time(
    backend: TritonBackend, name: str, shape: Shape, context: int, batch: int, device: torch.device, repetitions: int
) -> dict[str, float]:
    layers = _layers(Held(layout_of(name, shape, 1), 1, context, device).nbytes * batch, device)
    held = Held(layout_of(name, shape, layers), batch, context, device)
    inputs = random_rows(batch, shape, torch.bfloat16, device)
    plan = backend.plan(held.pool, held.layout, held.steps(), shape.head_dim**-0.5)

    def run() -> None:
        for layer in range(layers):
            plan.attend(layer, *inputs)

    return _per_layer(run, layers, held.nbytes / layers, device, repetitions)


def _torch_time(
    name: str, shape: Shape, context: int, batch: int, device: torch.device, repetitions: int
) -> dict[str, float]:
    size = batch * shape.kv_heads * context * shape.head_dim * 4
    layers = _layers(size, device)
    dims = (batch, shape.kv_heads, context, shape.head_dim)
    caches = [[torch.randn(dims, device=device, dtype=torch.bfloat16) for _ in range(2)] for _ in range(layers)]
    q = torch.randn(batch, shape.heads, 1, shape.head_dim, device=device, dtype=torch.bfloat16)
    if name == "flex":
        from torch.nn.attention.flex_attention import flex_attention

        compiled = flex_attention if device.type == "cpu" else torch.compile(flex_attention, dynamic=False)

        def one(k: Tensor, v: Tensor) -> object:
            return compiled(q, k, v, enable_gqa=True)
    else:
        kernels = [SDPBackend.MATH if device.type == "cpu" else SDPBackend.FLASH_ATTENTION]

        def one(k: Tensor, v: Tensor) -> object:
            with sdpa_kernel(kernels):
                return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def run() -> None:
        for k, v in caches:
            one(k, v)

    return _per_layer(run, layers, size, device, repetitions)


def _per_layer(run: Any, layers: int, nbytes: float, device: torch.device, repetitions: int) -> dict[str, float]:
    times = summary([t / layers for t in seconds(replayed(run, device), device, repetitions)])
    return times | {"layers": layers, "kv_bytes": nbytes, "bytes_per_s": nbytes / times["median_s"]}
