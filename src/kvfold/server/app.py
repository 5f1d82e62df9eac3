"""The application: routes, middleware, errors."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from kvfold import __version__
from kvfold.server.chat import chat_router
from kvfold.server.completions import completions_router
from kvfold.server.engine_client import EngineClient, Program
from kvfold.server.http_errors import add_error_handlers
from kvfold.server.limits import ApiKey, BodyLimit
from kvfold.server.messages import EngineOptions
from kvfold.server.openapi import DocumentedApp
from kvfold.server.options import ServerOptions
from kvfold.server.page import mount_page
from kvfold.server.service import Service
from kvfold.server.status import status_router


def create_app(engine: EngineOptions, options: ServerOptions, program: Program | None = None) -> FastAPI:
    """An application whose engine process (or `program`) starts and ends with it; `app.state.service`: its Service."""
    client = EngineClient(engine, program=program)
    service = Service(client, engine, options)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        client.start()
        try:
            yield
        finally:
            await client.stop()

    app = DocumentedApp(title="kvfold", version=__version__, lifespan=lifespan, description=_ABOUT)
    app.state.service = service
    app.include_router(chat_router(service), tags=["OpenAI"])
    app.include_router(completions_router(service), tags=["OpenAI"])
    app.include_router(status_router(service), tags=["Server"])
    mount_page(app)
    add_error_handlers(app)
    app.add_middleware(BodyLimit, most_bytes=options.max_body, seconds=options.body_timeout)
    if options.api_key is not None:
        app.add_middleware(ApiKey, key=options.api_key)
    return app


_ABOUT = (
    "An OpenAI-compatible server whose KV cache is compressed. Errors have OpenAI's shape; unknown fields are ignored."
)
