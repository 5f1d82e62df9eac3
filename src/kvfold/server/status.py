"""What the server says of itself: health, readiness, models, metrics, and what the page shows."""

import asyncio
import time
from dataclasses import asdict
from typing import Any, Literal

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from kvfold.server.chat_prompt import render
from kvfold.server.http_errors import APIError
from kvfold.server.openapi import JSON_ERRORS, ModelCard, ModelList, Tokens, answers
from kvfold.server.protocol import TokenizeRequest
from kvfold.server.service import Service
from kvfold.server.status_answers import Pool, Roles, State, Stats

POOL_SECONDS = 30.0


def status_router(service: Service) -> APIRouter:
    """Everything but generation."""
    router = APIRouter()
    client, began, created = service.client, time.monotonic(), int(time.time())

    @router.get("/health", summary="The API process lives")
    async def health() -> dict[str, Literal["ok"]]:
        return {"status": "ok"}

    @router.get(
        "/ready",
        responses={**answers(State), 503: {"model": State}},
        summary="Whether requests are taken; 503 where they are not",
    )
    async def ready() -> Response:
        return JSONResponse(_state(service), 200 if _state(service)["status"] == "ready" else 503)

    @router.get("/v1/models", responses=answers(ModelList), summary="The model, and its KV cache methods")
    async def models() -> dict[str, Any]:
        served = service.options.served_model
        most = None if client.ready is None else client.ready.max_positions
        model = {"id": served, "object": "model", "created": created, "owned_by": "kvfold"}
        return {"object": "list", "data": [{**model, "max_model_len": most, "kv_methods": list(service.methods)}]}

    @router.get("/v1/models/{name:path}", responses=answers(ModelCard), summary="The model by name")
    async def one_model(name: str) -> dict[str, Any]:
        service.check_model(name)
        found: dict[str, Any] = (await models())["data"][0]
        return found

    @router.post("/v1/tokenize", responses=answers(Tokens), summary="Token ids of a text or a conversation")
    async def tokenize(request: TokenizeRequest) -> dict[str, Any]:
        service.check_model(request.model)
        if (request.prompt is None) == (request.messages is None):
            raise APIError(400, "give either prompt or messages", param="prompt")
        text = await service.text()
        if request.messages is not None:
            tokens, _ = await render(text, request.messages)
        else:
            tokens = await text.encode(request.prompt or "", special=request.add_special_tokens)
        return {"count": len(tokens), "tokens": tokens, "max_model_len": service.ready.max_positions}

    @router.get("/metrics", response_class=PlainTextResponse, responses=JSON_ERRORS, summary="Prometheus metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/stats", responses=answers(Stats), summary="What the page charts")
    async def stats() -> dict[str, Any]:
        return {**_state(service), "uptime": time.monotonic() - began, **_stats(service)}

    @router.post("/cluster/roles", responses=answers(Roles), summary="Share a cluster's workers out anew")
    async def roles(wanted: Roles) -> Roles:
        workers = len(client.stats.workers)
        if not workers:
            raise APIError(400, "this server has one engine and no workers; start it with --prefill-workers")
        if wanted.prefill + wanted.decode != workers:
            raise APIError(400, f"there are {workers} workers, not {wanted.prefill} + {wanted.decode}; share those out")
        client.set_roles(wanted.prefill, wanted.decode)
        return wanted

    @router.get("/pool", responses=answers(Pool), summary="The map of the page pool")
    async def pool() -> dict[str, Any]:
        try:
            async with asyncio.timeout(POOL_SECONDS):
                shown = asdict(await client.pool())
        except TimeoutError:
            raise APIError(503, "the engine is busy; ask again", headers={"Retry-After": "1"}) from None
        return {**shown, "methods": list(service.methods)}

    return router


def _state(service: Service) -> dict[str, Any]:
    client = service.client
    draining = service.draining and client.status == "ready"
    status, reason = ("draining", "the server is shutting down") if draining else (client.status, client.reason)
    return {"status": status, "reason": reason, "restarts": client.restarts}


def _stats(service: Service) -> dict[str, Any]:
    stats, metrics = service.client.stats, service.metrics
    return {
        "model": service.options.served_model,
        "methods": [{**asdict(lane), "compression": lane.compression} for lane in stats.lanes],
        "pool": {
            "pages": stats.pages,
            "page_bytes": stats.page_bytes,
            "used": stats.used,
            "free": stats.pages - stats.used,
            "cached": stats.cached,
        },
        "running": stats.running,
        "waiting": stats.waiting,
        "prompt_tokens": stats.prompt_tokens,
        "generated_tokens": stats.generated_tokens,
        "preemptions": stats.preemptions,
        "prefix": {"queried_tokens": stats.prefix_queried_tokens, "hit_tokens": stats.prefix_hit_tokens},
        "workers": [asdict(worker) for worker in stats.workers],
        "ttft": {"p50": metrics.percentile(50), "p99": metrics.percentile(99)},
    }
