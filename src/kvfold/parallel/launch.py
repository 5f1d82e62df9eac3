"""Bringing ranks together: processes of this machine that are started here, or ranks that somebody else started."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from kvfold.config.progress import SILENT, Progress
from kvfold.parallel.errors import ParallelError
from kvfold.parallel.group import SequenceParallel
from kvfold.parallel.interface import listening_towards
from kvfold.parallel.loading import Loaded, ParallelConfig, load, shared_threads

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
GRACE = 10.0  # seconds that a follower has to end by itself


def launched_rank() -> int | None:
    """This process's rank where torchrun or the like started it, else None. Raises ParallelError for half of it."""
    present = [name for name in VARIABLES if os.environ.get(name)]
    if "RANK" not in present:
        return None
    missing = [name for name in VARIABLES if name not in present]
    if missing:
        raise ParallelError(
            f"RANK is set but {', '.join(missing)} is not; start the ranks with torchrun or set them all"
        )
    try:
        rank, ranks, _ = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    except ValueError as error:
        raise ParallelError("RANK, WORLD_SIZE and MASTER_PORT must be numbers; correct them") from error
    if not 0 <= rank < ranks:
        raise ParallelError(f"RANK={rank} does not go with WORLD_SIZE={ranks}; count ranks from 0")
    return rank


@contextmanager
def local_ranks(config: ParallelConfig, progress: Progress = SILENT) -> Iterator[tuple[SequenceParallel, Loaded]]:
    """Rank 0 in this process, the others in processes of their own, which end with the context."""
    with shared_threads(config.ranks):
        loaded = load(config, progress)  # first alone: what is wrong with the input is said once
        timeout = timedelta(seconds=config.timeout)
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timeout)
        with _followers(config, store.port) as followers:
            followers.wait_until_loaded(store)
            yield from _rank_zero(config, loaded, store)


@contextmanager
def joined_ranks(config: ParallelConfig, progress: Progress = SILENT) -> Iterator[tuple[SequenceParallel, Loaded]]:
    """Rank 0 among ranks that were started elsewhere; the environment's `VARIABLES` say where."""
    _check_world(config)
    loaded = load(config, progress)
    yield from _rank_zero(config, loaded, _environment_store(config, 0))


def follow(config: ParallelConfig) -> None:
    """A rank other than 0, until rank 0 lets it go."""
    rank = launched_rank()
    if not rank:
        raise ParallelError("a follower is rank 1 or above; set RANK")
    _check_world(config)
    loaded = load(config)
    store = _environment_store(config, rank)
    store.set(f"loaded/{rank}", "yes")
    with _process_group(config, store, rank) as group:
        _sequence_parallel(config, loaded, group, store).follow()


def _rank_zero(config: ParallelConfig, loaded: Loaded, store: TCPStore) -> Iterator[tuple[SequenceParallel, Loaded]]:
    with _process_group(config, store, 0) as group:
        parallel = _sequence_parallel(config, loaded, group, store)
        try:
            yield parallel, loaded
        except BaseException:
            with contextlib.suppress(ParallelError):
                parallel.close(patience=0)  # the others may never hear it: they wait for what this one was to send
            raise
        with contextlib.suppress(ParallelError):
            parallel.close()


def _sequence_parallel(
    config: ParallelConfig, loaded: Loaded, group: dist.ProcessGroup, store: TCPStore
) -> SequenceParallel:
    pages = config.kv_memory // loaded.lane.layout.page_bytes
    orders: Any = PrefixStore("orders", store)
    return SequenceParallel(
        loaded.model.decoder, loaded.lane, group, orders, loaded.identity, pages, config.variant, config.wire_bits
    )


@contextmanager
def _process_group(config: ParallelConfig, store: TCPStore, rank: int) -> Iterator[dist.ProcessGroup]:
    timeout = timedelta(seconds=config.timeout)
    try:
        with listening_towards(store.host, store.port):
            dist.init_process_group(config.backend, store=store, rank=rank, world_size=config.ranks, timeout=timeout)
    except RuntimeError as error:
        raise ParallelError(
            f"not all {config.ranks} ranks came within {config.timeout:g} s; start all of them, or give a longer "
            "timeout"
        ) from error
    try:
        group = dist.group.WORLD
        assert group is not None, "just made"
        yield group
    finally:
        dist.destroy_process_group()


def _environment_store(config: ParallelConfig, rank: int) -> TCPStore:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun serves the store itself
    timeout = timedelta(seconds=config.timeout)
    try:
        master = rank == 0 and not agent
        return TCPStore(host, port, is_master=master, wait_for_workers=False, timeout=timeout)
    except RuntimeError as error:
        raise ParallelError(
            f"rank 0 does not answer at {host}:{port} within {config.timeout:g} s; start it, and check MASTER_ADDR "
            "and MASTER_PORT"
        ) from error


def _check_world(config: ParallelConfig) -> None:
    launched_rank()
    world = int(os.environ["WORLD_SIZE"])
    if world != config.ranks:
        raise ParallelError(f"WORLD_SIZE is {world} and --sequence-parallel {config.ranks}; make them the same")


class _Followers:
    """Processes of this machine that are ranks 1 and up."""

    def __init__(self, config: ParallelConfig, port: int, folder: Path) -> None:
        self._logs = [folder / f"rank{rank}" for rank in range(1, config.ranks)]
        self._config = config
        self.processes = []
        for rank, log in enumerate(self._logs, 1):
            values = zip(VARIABLES, (str(rank), str(config.ranks), "127.0.0.1", str(port)), strict=True)
            command = [sys.executable, "-m", "kvfold.parallel.follower", config.as_json()]
            with log.open("wb") as file:
                environment = {**os.environ, **dict(values)}
                environment.pop("TORCHELASTIC_USE_AGENT_STORE", None)
                self.processes.append(
                    subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
                )

    def wait_until_loaded(self, store: TCPStore) -> None:
        """Raises ParallelError where one ends instead, or takes longer than the timeout."""
        end = time.monotonic() + self._config.timeout
        waiting = list(range(1, self._config.ranks))
        while waiting:
            waiting = [rank for rank in waiting if not store.check([f"loaded/{rank}"])]
            for rank in waiting:
                if self.processes[rank - 1].poll() is not None:
                    raise ParallelError(f"rank {rank} could not start: {self._last_words(rank)}")
            if waiting and time.monotonic() > end:
                raise ParallelError(
                    f"rank {waiting[0]} is not ready after {self._config.timeout:g} s; give a longer timeout or fewer "
                    "ranks"
                )
            time.sleep(0.05)

    def stop(self) -> None:
        """Lets those that were let go end, and ends the others."""
        deadline = time.monotonic() + GRACE
        for process in self.processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _last_words(self, rank: int) -> str:
        lines = self._logs[rank - 1].read_text(errors="replace").strip().splitlines()
        if lines:
            return lines[-1].removeprefix("kvfold: ")
        status = self.processes[rank - 1].returncode
        return f"it ended with status {status} and said nothing; look at the system's log"


@contextmanager
def _followers(config: ParallelConfig, port: int) -> Iterator[_Followers]:
    with tempfile.TemporaryDirectory(prefix="kvfold-ranks-") as folder:
        followers = _Followers(config, port, Path(folder))
        try:
            yield followers
        except BaseException:
            for process in followers.processes:
                process.terminate()
            raise
        finally:
            followers.stop()
