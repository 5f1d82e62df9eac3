"""Running the application: the socket, signals, draining."""

import asyncio
import logging
import socket
from types import FrameType

import uvicorn

from kvfold.errors import ConfigError, KvfoldError
from kvfold.server.app import create_app
from kvfold.server.connection import connection_class
from kvfold.server.engine_client import Program
from kvfold.server.messages import EngineOptions
from kvfold.server.options import ServerOptions
from kvfold.server.service import Service

log = logging.getLogger("kvfold.server")

POLL = 0.1  # seconds between looks at whether the last request has ended


class _Server(uvicorn.Server):
    """The first SIGTERM or SIGINT lets what runs finish and answers new requests with 503; the second stops at once."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._drain: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._drain is not None or self._service.client.status != "ready":
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        self._drain = asyncio.get_event_loop().create_task(self._finish(), name="drain")

    async def _finish(self) -> None:
        service, grace = self._service, self._service.options.grace
        log.info("shutting down: %d requests have %g s to finish", service.running, grace)
        try:
            async with asyncio.timeout(grace):
                while service.running:
                    await asyncio.sleep(POLL)
        except TimeoutError:
            log.warning("%d requests did not finish in time", service.running)
            await service.client.stop()  # they end with an error that says so
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError where the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot listen on {host}:{port} ({reason}); choose another --host or --port") from error
    # Connections inherit it. asyncio would set it only on sockets that name their protocol; without it every answer
    # of more than one write waits for the client's delayed acknowledgement, about 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def serve(
    listener: socket.socket,
    engine: EngineOptions,
    options: ServerOptions,
    log_level: str = "info",
    program: Program | None = None,
) -> None:
    """Serves until told to stop. program: see `EngineClient`.

    Raises KvfoldError where the engine refuses to start, saying why.
    """
    app = create_app(engine, options, program)
    service: Service = app.state.service
    config = uvicorn.Config(
        app,
        http=connection_class(options.body_timeout),
        log_config=None,
        log_level=log_level,
        access_log=log_level == "debug",
        timeout_graceful_shutdown=5,
        timeout_keep_alive=75,  # longer than clients and proxies keep idle connections, so that they close first
        server_header=False,
    )
    server = _Server(config, service)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host

    async def run() -> None:
        watch = asyncio.create_task(_watch_start(server, service, f"http://{shown}:{port}"))
        await server.serve(sockets=[listener])
        watch.cancel()

    asyncio.run(run())
    if service.client.refusal is not None:
        raise KvfoldError(service.client.refusal)


async def _watch_start(server: uvicorn.Server, service: Service, url: str) -> None:
    """Says when requests are taken, or ends a server whose engine refused to start."""
    while not server.started:
        await asyncio.sleep(POLL)
    log.info("listening on %s, loading %s", url, service.options.served_model)
    await service.client.wait_started()
    if service.client.refusal is not None:
        server.should_exit = True
    elif service.client.status == "ready":
        await service.text()
        log.info("ready on %s with %s", url, ", ".join(service.methods))
