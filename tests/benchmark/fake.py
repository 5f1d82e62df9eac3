"""A small OpenAI-compatible server that misbehaves on request and records what it was asked and what it sent."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

MODEL = "fake-model"
BOS = 1
"""Special tokens that the tokenizer adds to every text."""
TEMPLATE = 11
"""Tokens that the chat template adds to every prompt."""

OK, TOO_MANY, BROKEN, DROP, ERROR_EVENT, GARBAGE, HANG, NO_STREAM = (
    "ok", "429", "500", "drop", "error event", "garbage", "hang", "no stream",
)  # fmt: skip


def count_tokens(text: str) -> int:
    """A tokenizer that splits at spaces, then every four characters, and adds `BOS`."""
    return BOS + sum(-(-len(word) // 4) for word in text.split())


@dataclass
class Asked:
    """One completion that was asked for. tokens: how many were sent."""

    body: dict[str, Any]
    prompt: str
    prompt_tokens: int
    behaviour: str
    tokens: int = 0
    finished: bool = False


@dataclass
class Fake:
    """behaviour: what to do with the n-th measured request; probes (of one token) are always answered.

    refused: fields that are answered with 400. tokenizer, usage, models: whether those exist. delay: seconds
    between tokens. stop_after: ends answers early, as a model does without `ignore_eos`.
    """

    behaviour: Callable[[int], str] = lambda _: OK
    refused: frozenset[str] = frozenset()
    tokenizer: bool = True
    usage: bool = True
    models: bool = True
    context: int | None = None
    key: str | None = None
    delay: float = 0.0
    stop_after: int | None = None
    methods: tuple[str, ...] = ("none", "zeroc(bits=4)")
    url: str = ""
    probes: list[Asked] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    tokenized: list[str] = field(default_factory=list)
    in_flight: int = 0
    peak: int = 0

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/tokenize", self._tokenize, methods=["POST"]),
                Route("/v1/chat/completions", self._complete, methods=["POST"]),
                Route("/v1/completions", self._complete, methods=["POST"]),
            ]
        )

    async def _models(self, request: Request) -> Response:
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return _error(401, "no key")
        if not self.models:
            return _error(404, "no list")
        entry = {"id": MODEL, "object": "model", "max_model_len": self.context}
        return JSONResponse({"object": "list", "data": [entry]})

    async def _tokenize(self, request: Request) -> Response:
        if not self.tokenizer:
            return _error(404, "no tokenizer")
        text = (await request.json())["prompt"]
        self.tokenized.append(text)
        return JSONResponse({"count": count_tokens(text), "tokens": [], "max_model_len": self.context})

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        chat = request.url.path.endswith("chat/completions")
        prompt = body["messages"][0]["content"] if chat else body["prompt"]
        tokens = count_tokens(prompt) + (TEMPLATE if chat else 0)
        wanted = body.get("max_tokens", body.get("max_completion_tokens"))
        if unknown := self.refused & set(body):
            return _error(400, f"unknown field {sorted(unknown)[0]}")
        if body.get("kv", "none") not in self.methods:
            return _error(400, f"unknown method {body['kv']}")
        if wanted == 1:
            record = Asked(body, prompt, tokens, OK)
            self.probes.append(record)
        else:
            record = Asked(body, prompt, tokens, self.behaviour(len(self.asked)))
            self.asked.append(record)
        if record.behaviour == TOO_MANY:
            return _error(429, "the queue is full")
        if record.behaviour == BROKEN:
            return _error(500, "engine died")
        if record.behaviour == NO_STREAM:
            return JSONResponse({"choices": []})
        return StreamingResponse(self._stream(record, wanted, chat), media_type="text/event-stream")

    async def _stream(self, record: Asked, wanted: int, chat: bool) -> AsyncIterator[bytes]:
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        try:
            if chat:
                yield _event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
            count = wanted if self.stop_after is None else min(wanted, self.stop_after)
            for n in range(count):
                if n == count // 2 and record.behaviour != OK:
                    if record.behaviour == DROP:
                        raise ConnectionResetError
                    if record.behaviour == HANG:
                        await asyncio.sleep(3600)
                    yield (
                        _event({"error": {"message": "engine died"}})
                        if record.behaviour == ERROR_EVENT
                        else b"data: {\n\n"
                    )
                    return
                await asyncio.sleep(self.delay)
                text = {"delta": {"content": "tok "}} if chat else {"text": "tok "}
                record.tokens += 1
                yield b": keep-alive\n\n" + _event({"choices": [{"index": 0, "finish_reason": None, **text}]})
            yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
            if self.usage and record.body.get("stream_options"):
                held = 100 * (record.prompt_tokens + record.tokens)
                factor = 4 if record.body.get("kv", "none") != "none" else 1
                kv = {"method": record.body.get("kv", "none"), "bytes": held // factor, "dense_bytes": held}
                usage = {"prompt_tokens": record.prompt_tokens, "completion_tokens": record.tokens, "kv": kv}
                yield _event({"choices": [], "usage": {**usage, "prompt_tokens_details": {"cached_tokens": 3}}})
            yield b"data: [DONE]\n\n"
            record.finished = True
        finally:
            self.in_flight -= 1


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "x", "param": None, "code": None}}, status)


@contextmanager
def serving(fake: Fake) -> Iterator[Fake]:
    """`fake` on a free port of this machine, in a thread of its own."""
    # With the protocol named, asyncio turns Nagle's algorithm off; else tokens come in clumps of 40 ms.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    fake.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(fake.app(), log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        listener.close()
