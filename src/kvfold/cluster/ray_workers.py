"""Workers as Ray actors: where they run, how they are started, how their end is noticed."""

import asyncio
import os
import re
import secrets
import socket
import time
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from kvfold.cluster.members import WorkerGone
from kvfold.cluster.options import ClusterOptions
from kvfold.cluster.ray_objects import NAMESPACE
from kvfold.cluster.reason import first_line
from kvfold.cluster.worker import Worker
from kvfold.errors import ClusterError

# Unless told otherwise, Ray reports to its makers, runs workers at low priority, and waits a minute for a head node,
# half of one with Ray Client.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    "RAY_CLIENT_RECONNECT_GRACE_PERIOD": "10",
}
KNOCK_SECONDS = 5.0
PLACE_SECONDS = 30.0  # for resources that others may be about to give back


class RayLink:
    """The way to one actor. Everything raises ConnectionError once Ray Client has lost its head node."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def send(self, command: bytes) -> None:
        """See `Link.send`."""
        _call(self._actor.send, command)  # calls of one caller begin in their order

    async def receive(self) -> list[bytes]:
        """See `Link.receive`."""
        events: list[bytes] = await _or_gone(_call(self._actor.receive))
        return events

    async def ping(self) -> None:
        """See `Link.ping`."""
        await _or_gone(_call(self._actor.ping))

    def kill(self) -> None:
        """See `Link.kill`."""
        ray.kill(self._actor)


class RayWorkers:
    """Connects to Ray, or starts it on this machine, and reserves the workers' cores as one placement group.

    options: the arguments of `LLM`. patience: seconds for a head node that restarts to come back. Raises ClusterError
    where there is no such cluster or too little in it.
    """

    def __init__(self, options: dict[str, Any], cluster: ClusterOptions, patience: float = 0.0) -> None:
        self._options = options
        self._cluster = cluster
        self._secret = secrets.token_bytes(32)
        self._starts = 0
        address = cluster.ray_address
        cores = max(os.cpu_count() or 1, cluster.workers if cluster.threads is None else 1)
        own: dict[str, Any] = {} if address else {"num_cpus": cores, "include_dashboard": False}
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        _knock(address, patience)
        deadline = time.monotonic() + patience
        while not ray.is_initialized():
            try:
                # Without an address Ray would join whatever runs here.
                where = address or "local"
                ray.init(address=where, namespace=NAMESPACE, configure_logging=False, log_to_driver=False, **own)
            except (RayError, ConnectionError, RuntimeError, ValueError, OSError) as error:
                if time.monotonic() < deadline:
                    time.sleep(1)
                    continue
                raise _refusal(address, error) from error
        self.threads = self._threads()
        self._group = self._reserve()

    async def spawn(self, name: str, number: int) -> RayLink:
        """Starts the process of a worker, in the part of the placement group that is its. Raises WorkerGone."""
        self._starts += 1
        cluster = self._cluster
        unique = f"{name}.{os.getpid()}.{self._starts}"
        place = PlacementGroupSchedulingStrategy(placement_group=self._group, placement_group_bundle_index=number)
        remote: Any = ray.remote(Worker)
        actor = remote.options(
            name=unique,
            num_cpus=self.threads,
            num_gpus=cluster.gpus or None,
            scheduling_strategy=place,
            max_concurrency=64,
        )
        options = {**self._options, "threads": self.threads}
        transport = (cluster.transport, self._secret, cluster.link_gbps, cluster.stall_seconds)
        made = actor.remote(unique, options, *transport)
        await _or_gone(_call(made.start))
        return RayLink(made)

    def close(self) -> None:
        """Ends all workers, and Ray where it was started here."""
        if ray.is_initialized():  # else Ray would join or start some cluster to look for the group in
            remove_placement_group(self._group)
            ray.shutdown()

    def _threads(self) -> int:
        """Of each worker, so that they share the smallest node's cores."""
        if self._cluster.threads is not None:
            return self._cluster.threads
        nodes = [node for node in ray.nodes() if node["Alive"]]
        cores = min(int(node["Resources"].get("CPU", 0)) for node in nodes)
        return max(1, cores // -(-self._cluster.workers // len(nodes)))

    def _reserve(self) -> PlacementGroup:
        count, threads = self._cluster.workers, self.threads
        wanted, there = count * threads, int(ray.cluster_resources().get("CPU", 0))
        if wanted > there:
            ray.shutdown()
            raise ClusterError(
                f"{count} workers of {threads} threads need {wanted} cores and the Ray cluster has {there}; "
                "ask for fewer workers or threads, or add nodes"
            )
        gpus, gpus_there = count * self._cluster.gpus, int(ray.cluster_resources().get("GPU", 0))
        if gpus > gpus_there:
            ray.shutdown()
            raise ClusterError(
                f"--transport nccl wants a GPU for each of {count} workers and the Ray cluster has {gpus_there}; "
                "choose --transport tcp, or add GPUs"
            )
        bundle = {"CPU": float(threads), **({"GPU": float(self._cluster.gpus)} if gpus else {})}
        group: PlacementGroup = placement_group([bundle] * count, strategy="SPREAD")
        if not group.wait(PLACE_SECONDS):
            free = ray.available_resources().get("CPU", 0)
            ray.shutdown()
            raise ClusterError(
                f"{wanted} cores were not free within {PLACE_SECONDS:g} s ({free:g} are); end what else runs there"
            )
        return group


def _knock(address: str | None, patience: float) -> None:
    """Ray itself takes minutes to see that nobody listens at an address. Raises ClusterError."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host:
        return
    deadline = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=KNOCK_SECONDS).close()
        except (OSError, ValueError, OverflowError) as error:
            if time.monotonic() > deadline:
                raise ClusterError(f"no Ray cluster answers at {address} ({error}); check --ray-address") from error
            time.sleep(1)
        else:
            return


def _refusal(address: str | None, error: Exception) -> ClusterError:
    """Why there is no connection, in one sentence."""
    if "Version mismatch" in str(error):
        theirs, ours = re.findall(r"Ray: (\S+)\s+Python: (\S+)", str(error))
        there, here = (f"Ray {release} and Python {python}" for release, python in (theirs, ours))
        return ClusterError(f"the cluster at {address} runs {there}, kvfold {here}; install the same on both sides")
    why = first_line(error)
    if address is None:
        return ClusterError(f"Ray cannot be started here ({why}); see its log, or give --ray-address")
    if isinstance(error, ConnectionAbortedError):  # a race in Ray (ray-project/ray#63202)
        return ClusterError(f"{address} could not serve one more client; try again, or see docs/cluster.md: Ray Client")
    token = ", and RAY_AUTH_MODE if it wants a token" if address.startswith("ray://") else ""
    return ClusterError(f"no Ray cluster answers at {address} ({why}); check --ray-address{token}")


def _call(method: Any, *arguments: Any) -> Any:
    try:
        return method.remote(*arguments)
    except Exception as error:  # Ray Client has no type of its own for this
        if ray.is_initialized():
            raise
        raise ConnectionError(first_line(error)) from error


async def _or_gone(reference: Any) -> Any:
    answer = asyncio.wrap_future(reference.future())
    answer.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may want it any more
    try:
        return await asyncio.shield(answer)  # Ray Client cannot bear cancellation
    except RayError as error:
        raise WorkerGone(first_line(error)) from error
