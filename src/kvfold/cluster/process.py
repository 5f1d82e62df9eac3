"""The router's process: `python -m kvfold.cluster.process ADDRESS OPTIONS`, in the place of an engine process.

To the API process it is an engine: the same commands, the same events. Ray ends whoever is connected to a head node
that is gone, so this has a process of its own, which the API process starts again.
"""

import asyncio
import json
import logging
import os
import signal
import sys
from typing import Any

import zmq
import zmq.asyncio

from kvfold.cluster.options import ClusterOptions
from kvfold.cluster.ray_workers import RayWorkers
from kvfold.cluster.reason import first_line
from kvfold.cluster.router import Router
from kvfold.errors import ClusterError
from kvfold.server.messages import Loading, Refused, decode_command, encode

log = logging.getLogger("kvfold.cluster")

RETURN_SECONDS = 120.0  # for a head node that was there before
PARENT_SECONDS = 1.0  # between looks at whether the API process lives


async def _read(socket: zmq.asyncio.Socket, router: Router) -> None:
    while True:
        router.handle(decode_command(await socket.recv()))


async def _until_told(stop: asyncio.Event) -> None:
    parent = os.getppid()
    while os.getppid() == parent and not stop.is_set():
        try:
            async with asyncio.timeout(PARENT_SECONDS):
                await stop.wait()
        except TimeoutError:
            continue


async def route(socket: zmq.asyncio.Socket, workers: RayWorkers, options: ClusterOptions, methods: list[str]) -> None:
    """Serves until the API process is gone or SIGTERM comes. Raises ClusterError where workers cannot be started, and
    ConnectionError where Ray Client's head node is lost."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)

    def deliver(event: Any) -> None:
        socket.send(encode(event))  # without a high-water mark this never waits

    router = Router(options, methods, workers.spawn, deliver)
    tasks = [asyncio.create_task(c) for c in (router.run(), _read(socket, router), _until_told(stop))]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    except* (ClusterError, ConnectionError) as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def run_router(address: str, options: dict[str, Any], restarts: int = 0) -> int:
    """Returns the exit code. options: `engine`, the arguments of `LLM`, and `cluster`, those of `ClusterOptions`;
    restarts: so far."""
    context = zmq.asyncio.Context()
    socket: zmq.asyncio.Socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.connect(address)
    cluster = ClusterOptions(**options["cluster"])
    workers = None
    try:
        await socket.send(encode(Loading("starting Ray")))
        workers = RayWorkers(options["engine"], cluster, RETURN_SECONDS if restarts else 0.0)
        await route(socket, workers, cluster, options["engine"]["kv"])
    except ClusterError as error:
        await socket.send(encode(Refused(str(error))))
    except ConnectionError as error:
        log.error("the head node at %s is lost (%s)", cluster.ray_address, first_line(error))
        return 1
    finally:
        if workers is not None:
            workers.close()
        socket.close(linger=1000)
        context.term()
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the API process decides what an interrupt means
    logging.basicConfig(stream=sys.stderr, level="INFO", format="%(asctime)s %(levelname)s %(message)s", datefmt="%X")
    sys.exit(asyncio.run(run_router(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]))))
