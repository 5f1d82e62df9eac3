"""Sixty-four clients that come, go, ask for too much and make mistakes: nothing is lost and nobody's answer changes."""

import asyncio
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx
import psutil

from tests.server.hostile import assert_error
from tests.server.running import RunningServer

CLIENTS, REQUESTS, DIFFERENT = 64, 300, 24
METHODS = ["none", "zeroc(bits=4)"]
TEXT = "a page belongs to one sequence, layer and head; keys are held as codes and attention reads them"
BAD: list[bytes] = [b"{", b'{"prompt": ""}', b'{"prompt": "a", "n": 0}', b'{"prompt": "a", "kv": "x"}', b"[" * 5000]
PATHS = ("/v1/completions", "/v1/chat/completions")


def sound(number: int) -> tuple[str, dict[str, Any]]:
    """A seeded request, a function of its number.

    Answers are short: in another batch logits differ in their last bits, and among very many draws one would lie
    between the two.
    """
    dice = random.Random(number)
    text = " ".join(dice.choices(TEXT.split(), k=dice.choice([3, 20, 60])))
    body: dict[str, Any] = {"seed": number, "max_tokens": dice.choice([1, 8, 30]), "kv": dice.choice(METHODS)}
    body |= {"ignore_eos": True, "n": dice.choice([1, 1, 2])}
    path = dice.choice(PATHS)
    return path, body | ({"prompt": text} if path == PATHS[0] else {"messages": [{"role": "user", "content": text}]})


def texts(answer: dict[str, Any]) -> list[str]:
    return [choice["text"] if "text" in choice else choice["message"]["content"] for choice in answer["choices"]]


async def read_stream(client: httpx.AsyncClient, path: str, body: dict[str, Any], stop: int | None) -> list[str]:
    """The texts of a streamed answer; with `stop`, leaves after so many lines."""
    found = [""] * body["n"]
    async with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        lines = 0
        async for line in response.aiter_lines():
            lines += 1
            if stop is not None and lines > stop:
                return []
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    new = choice["text"] if "text" in choice else choice["delta"].get("content", "")
                    found[choice["index"]] += new
    return found


async def one(client: httpx.AsyncClient, number: int, alone: list[list[str]], kinds: Counter[str]) -> None:
    dice = random.Random(f"kind {number}")
    kind = dice.choice(["whole", "whole", "stream", "stream", "leave", "leave", "timeout", "long", "bad"])
    kinds[kind] += 1
    which = dice.randrange(len(alone))
    path, body = sound(which)
    if kind == "whole":
        response = await client.post(path, json=body)
        assert response.status_code == 200, response.text
        assert texts(response.json()) == alone[which]
    elif kind == "stream":
        assert await read_stream(client, path, body, None) == alone[which]
    elif kind == "leave":
        await read_stream(client, path, {**body, "max_tokens": 200}, dice.randrange(20))
    elif kind == "timeout":
        with suppress(httpx.TimeoutException):
            await client.post(path, json={**body, "max_tokens": 200}, timeout=dice.uniform(0.001, 0.3))
    elif kind == "long":  # four that grow where the scheduler counted on one, so that others are preempted
        response = await client.post(path, json={**body, "n": 4, "max_tokens": 70})
        assert response.json()["usage"]["completion_tokens"] == 280
    else:
        response = await client.post(path, content=dice.choice(BAD), headers={"Content-Type": "application/json"})
        assert_error(response, 400)


async def soak(url: str, alone: list[list[str]]) -> Counter[str]:
    """All requests, each from the next client that is free; returns how many there were of each kind."""
    kinds: Counter[str] = Counter()
    numbers = iter(range(REQUESTS))

    async def work() -> None:
        limits = httpx.Limits(max_connections=1)
        async with httpx.AsyncClient(base_url=url, timeout=120.0, limits=limits) as client:
            for number in numbers:
                await one(client, number, alone, kinds)

    async with asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(work())
    return kinds


def held(server: RunningServer) -> dict[str, int]:
    """What a leak would make more of, in both processes: open files and connections."""
    own, engine = psutil.Process(server.process.pid), server.engine()
    return {
        "files": own.num_fds(),
        "connections": len(own.net_connections("tcp")),
        "engine files": engine.num_fds(),
        "engine threads": engine.num_threads(),
        "processes": len(own.children(recursive=True)),
    }


def answers_alone(server: RunningServer, count: int) -> list[list[str]]:
    with server.client() as client:
        return [texts(client.post(path, json=body).json()) for path, body in map(sound, range(count))]


def leaked(server: RunningServer, before: dict[str, int]) -> dict[str, int]:
    """What is held more than before, once connections that clients closed are gone."""
    for _ in range(100):
        more = {name: count - before[name] for name, count in held(server).items() if count > before[name]}
        if not more:
            break
        server.wait_idle()
    return more


def test_soak(start_server: Callable[..., RunningServer]) -> None:
    options = [part for method in METHODS for part in ("--kv", method)]
    server = start_server(*options, "--kv-memory", "192KiB")
    alone = answers_alone(server, DIFFERENT)
    server.wait_idle()
    before = held(server)
    engine = server.engine().pid

    kinds = asyncio.run(soak(server.url, alone))

    assert min(kinds.values()) > 10
    stats = server.wait_idle()
    assert stats["preemptions"] > 0  # or the soak was too gentle
    assert stats["pool"]["used"] + stats["pool"]["free"] == stats["pool"]["pages"]
    assert not leaked(server, before)
    with server.client() as client:
        metrics = client.get("/metrics").text
        for name in ("running", "waiting"):
            assert re.search(rf"^kvfold:num_requests_{name} 0.0$", metrics, re.MULTILINE)
    assert answers_alone(server, DIFFERENT) == alone
    assert server.engine().pid == engine
    assert not [line for line in server.log if "Traceback" in line or "ERROR" in line]
