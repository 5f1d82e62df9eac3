"""Whether a server's memory grows: clients ask for some minutes, and its resident memory is read every second.

    python -m benchmarks.serving_memory [--clients 64] [--minutes 5] [--kv-memory 64MiB] [--kv METHOD ...]

Prints one JSON object: resident memory (MiB) of the API process and the engine process after the first minute and at
the end, and the growth of both together. The KV pool is small, so that prefix snapshots fill it within the first
minute: the operating system gives a pool's memory page by page as it is first written.
"""

import argparse
import asyncio
import json
import random
import statistics
import time

import httpx
import psutil

from benchmarks.serving import serving

SETTLE = 10  # seconds that each reading is a median of


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--kv-memory", default="64MiB")
    parser.add_argument("--kv", action="append")
    options = parser.parse_args()
    methods = options.kv or ["none", "zeroc(bits=4)"]
    kv = [part for method in methods for part in ("--kv", method)]
    with serving("--kv-memory", options.kv_memory, *kv) as (url, pid):
        requests, readings = asyncio.run(load(url, methods, options, psutil.Process(pid)))
    after_minute = middle([rss for at, rss in readings if 60 <= at < 60 + SETTLE])
    end = middle([rss for at, rss in readings if at >= readings[-1][0] - SETTLE])
    growth = sum(end.values()) / sum(after_minute.values()) - 1
    shown = {"requests": requests, "after_a_minute": after_minute, "at_the_end": end, "growth": growth}
    print(json.dumps({"settings": vars(options), **shown}, indent=2))


def middle(readings: list[dict[str, float]]) -> dict[str, float]:
    """The median of each process's readings."""
    return {name: statistics.median(reading[name] for reading in readings) for name in readings[0]}


async def load(
    url: str, methods: list[str], options: argparse.Namespace, server: psutil.Process
) -> tuple[int, list[tuple[float, dict[str, float]]]]:
    """How many requests were answered, and (seconds since the start, resident MiB by process) once a second."""
    began, done = time.monotonic(), 0
    end = began + 60 * options.minutes
    readings: list[tuple[float, dict[str, float]]] = []

    async def one_client(client: httpx.AsyncClient, seed: int) -> None:
        nonlocal done
        generator = random.Random(seed)
        while time.monotonic() < end:
            prompt = [generator.randrange(100, 40_000) for _ in range(generator.randint(1, 96))]
            body = {"prompt": prompt, "max_tokens": generator.randint(1, 24), "kv": generator.choice(methods)}
            if generator.random() < 0.5:
                (await client.post("/v1/completions", json=body)).raise_for_status()
            else:
                async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
                    async for _ in response.aiter_lines():
                        if generator.random() < 0.02:
                            break  # and leave
            done += 1

    async def watch() -> None:
        while time.monotonic() < end:
            (engine,) = server.children()
            processes = {"api": server, "engine": engine}
            resident = {name: process.memory_info().rss / 2**20 for name, process in processes.items()}
            readings.append((time.monotonic() - began, resident))
            await asyncio.sleep(1)

    limits = httpx.Limits(max_connections=options.clients)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        await asyncio.gather(watch(), *(one_client(client, seed) for seed in range(options.clients)))
    return done, readings


if __name__ == "__main__":
    main()
