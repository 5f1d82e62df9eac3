"""From a model and methods to a profile: build the engine, measure its steps, fit."""

import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kvfold import __version__
from kvfold.config.method import list_methods
from kvfold.config.progress import SILENT, Progress
from kvfold.engine.llm import LLM, resolve_dtypes
from kvfold.kv.layout import CacheLayout
from kvfold.kv.staged import StagedLayout
from kvfold.model.loading import load_spec
from kvfold.planner.document import VERSION, EngineLimits, Machine, MethodProfile, Profile
from kvfold.planner.errors import ProfileError
from kvfold.planner.fit import fit_latency
from kvfold.planner.grid import FULL, QUICK, Grid, fit_grid
from kvfold.planner.measure import Bench, measure

NEAR = 512
"""Tokens that pages of a sequence may hold beyond its own: page ends, sinks and recent tokens."""


def profile_engine(
    model: str | Path,
    kv: str | Sequence[str],
    *,
    grid: Grid | None = None,
    quick: bool = False,
    cpu_time: bool = False,
    threads: int | None = None,
    dtype: str = "auto",
    weights: str = "auto",
    kv_dtype: str = "auto",
    progress: Progress = SILENT,
    **options: Any,
) -> Profile:
    """Measures and fits every method of `kv` in one engine, in turns.

    cpu_time: count the processor's time instead of the wall's, which on a machine that others use too is the time that
    they do not take; for one thread only. options: of `LLM`. Raises what `LLM` raises, and ProfileError.
    """
    if cpu_time and threads != 1:
        raise ProfileError("processor time adds up over threads; give --threads 1 with --cpu-time")
    methods = list_methods(kv)
    spec = load_spec(model)
    compute, raw_bits = resolve_dtypes(dtype, kv_dtype)
    fitted = fit_grid(grid or (QUICK if quick else FULL), spec.max_positions)
    limits = EngineLimits()
    llm = LLM(
        model,
        kv=methods,
        kv_memory=_tokens(fitted, len(methods)) * spec.kv_elements * raw_bits // 8,
        dtype=dtype,
        weights=weights,
        kv_dtype=kv_dtype,
        chunk=limits.chunk,
        max_batch_tokens=limits.max_batch_tokens,
        max_sequences=limits.max_sequences,
        threads=threads,
        prefix_caching=False,  # a prompt that was read before would be no measurement
        progress=progress,
        **options,
    )
    lanes = range(len(methods))
    measured = measure(
        Bench(llm.engine, spec.vocab, time.process_time if cpu_time else time.perf_counter), lanes, fitted, progress
    )
    profiles = []
    for lane, (points, transfer) in zip(llm.engine.lanes, measured, strict=True):
        sealed = lane.layout if isinstance(lane.layout, CacheLayout) else None
        staged = lane.layout if isinstance(lane.layout, StagedLayout) else None
        uneven = lane.staging is not None and lane.staging.policy.uneven
        profiles.append(MethodProfile(lane.label, fit_latency(points), transfer, sealed, staged, uneven, tuple(points)))
    name = Path(model).name if Path(model).exists() else str(model)
    machine = Machine(
        _processor(), torch.get_num_threads(), "cpu" if cpu_time else "wall", __version__, str(torch.__version__)
    )
    computed, stored = str(compute).removeprefix("torch."), {16: "bfloat16", 32: "float32"}[raw_bits]
    return Profile(VERSION, name, computed, stored, weights, spec.max_positions, machine, limits, tuple(profiles))


def _tokens(grid: Grid, methods: int) -> int:
    """Tokens of a dense cache that hold everything the grid has at one time."""
    kept = sum(context + NEAR for context in {case.context for case in grid.cases if case.batch})
    most = max(
        case.batch * (case.context + grid.most_steps + NEAR) + case.prompts * (case.length + NEAR)
        for case in grid.cases
    )
    copied = max((case.context + NEAR for case in grid.cases), default=0)
    return methods * kept + most + copied


def _processor() -> str:
    """The processor's name; Linux tells it in a file only."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
