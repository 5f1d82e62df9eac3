"""Real ranks for tests: processes that stay, and follow one group after the other, some or all of them."""

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from kvfold.attention.reference import ReferenceBackend
from kvfold.engine.lane import build_lane
from kvfold.errors import KvfoldError
from kvfold.methods.registry import build_method
from kvfold.model.loading import LoadedModel, load_model
from kvfold.parallel.group import SequenceParallel
from kvfold.parallel.identity import Identity

TIMEOUT = timedelta(seconds=30)


@dataclass(frozen=True)
class Job:
    """One group: what every rank builds."""

    number: int
    model: Path
    method: str
    variant: Any = "ring"
    wire_bits: int = 16
    n_pages: int = 4096
    ranks: int = 2
    calibration: str = "c"  # as this rank says


class Ranks:
    """`most` ranks, this process being rank 0. reports: what the others said after the last group."""

    def __init__(self, most: int) -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        context = mp.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(1, most):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, most, self._store.port, there), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)
        self._groups = _join(self._store, 0, most)
        self._jobs = 0
        self.reports: list[str] = []

    @contextmanager
    def group(
        self, model: LoadedModel, statistics: Mapping[str, Tensor], method: str, odd: str = "c", **options: Any
    ) -> Iterator[SequenceParallel]:
        """Rank 0 of a group. odd: the calibration that the last rank claims to have."""
        path = model.path / "statistics.pt"
        if not path.exists():
            torch.save(dict(statistics), path)
        job = Job(self._jobs, model.path, method, **options)
        self._jobs += 1
        pipes = self._pipes[: job.ranks - 1]
        for rank, pipe in enumerate(pipes, 1):
            pipe.send(replace(job, calibration=odd) if rank == job.ranks - 1 else job)
        group = None
        try:
            group = _build(job, model, self._store, self._groups)
            yield group
            group.check_integrity()
        finally:
            if group is not None:
                group.close()
                group.check_integrity()
            self.reports = [pipe.recv() if pipe.poll(60) else "hangs" for pipe in pipes]

    def end(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(20)
            process.kill()
        dist.destroy_process_group()


def _join(store: Any, rank: int, most: int) -> dict[int, Any]:
    """The group of the first 2, 3, ... ranks."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=most, timeout=TIMEOUT)
    return {count: dist.new_group(list(range(count)), timeout=TIMEOUT) for count in range(1, most + 1)}


def _build(job: Job, model: LoadedModel, store: Any, groups: Mapping[int, Any]) -> SequenceParallel:
    statistics = torch.load(model.path / "statistics.pt", weights_only=True)
    lane = build_lane(model.decoder, job.method, build_method(job.method), 32, statistics)
    identity = Identity("tiny", job.method, job.calibration, "float32", f"{job.variant} {job.wire_bits}")
    orders: Any = dist.PrefixStore(f"job{job.number}", store)
    settings: tuple[Any, ...] = (job.n_pages, job.variant, job.wire_bits, ReferenceBackend())
    return SequenceParallel(model.decoder, lane, groups[job.ranks], orders, identity, *settings)


def _serve(rank: int, most: int, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=TIMEOUT)
    groups = _join(store, rank, most)
    models: dict[Path, LoadedModel] = {}
    while (job := pipe.recv()) is not None:
        try:
            if job.model not in models:
                models[job.model] = load_model(job.model, dtype=torch.float32)
            group = _build(job, models[job.model], store, groups)
            group.follow()
            group.check_integrity()
            pipe.send("fine")
        except KvfoldError as error:
            pipe.send(f"{type(error).__name__}: {error}")
        except Exception:
            pipe.send(traceback.format_exc())
