"""How long an answer waits for its prompt's cache to cross from one worker to another, and how many bytes cross.

    python -m benchmarks.handover --kv none --kv "zeroc(bits=4)" --link-gbps 1 --link-gbps 10 --tokens 4096

For each rate, one cluster of a prefill and a decode worker (`kvfold serve`); methods in turns, `--repetitions` times,
each with a prompt of its own. One JSON line per method and rate: `wait_ms` is the time between a request's first token
(the prefill worker's) and its second (the decode worker's), `step_ms` the median time between those that follow;
`wire_bytes_per_token` counts pages, frames and tail as they were received, `of_dense` over 16-bit keys and values.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from benchmarks.serving import serving

NEW = 24  # tokens of each answer
SECONDS = 300.0


def ask(client: httpx.Client, model: str, method: str, prompt: list[int]) -> tuple[list[float], float]:
    """When each token of an answer came, in seconds, and the bytes of a token in a dense cache."""
    body = {"model": model, "prompt": prompt, "kv": method, "max_tokens": NEW, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    times, dense = [], 0.0
    with client.stream("POST", "/v1/completions", json={**body, "ignore_eos": True}) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            event = json.loads(line[6:]) if line.startswith("data: {") else {}
            if event.get("choices"):
                times.append(time.perf_counter())
            elif event.get("usage"):
                tokens = event["usage"]["prompt_tokens"] + NEW - 1
                dense = event["usage"]["kv"]["dense_bytes"] / tokens
    return times, dense


def fetched(client: httpx.Client, before: int = -1) -> int:
    """Bytes that workers have received so far, once they are other than `before`."""
    while True:
        total = sum(worker["fetched_bytes"] for worker in client.get("/stats").json()["workers"])
        if total != before:
            return int(total)
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--kv", action="append", required=True)
    parser.add_argument("--link-gbps", action="append", type=float, required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--transport", default="tcp")
    parser.add_argument("--weights", default="auto")
    text = Path(os.environ.get("KVFOLD_DATA", "")) / "wikitext2" / "wiki.test.raw"
    parser.add_argument("--text", type=Path, default=text)
    given = parser.parse_args()
    for gbps in given.link_gbps:
        link = ["--link-gbps", f"{gbps:g}"] if given.transport == "tcp" else []
        kv = [part for method in given.kv for part in ("--kv", method)]
        workers = ("--prefill-workers", "1", "--decode-workers", "1", "--transport", given.transport, *link)
        engine = ("--model", given.model, "--weights", given.weights, "--kv-memory", "2GiB", *kv)
        with serving(*engine, *workers) as (url, _), httpx.Client(base_url=url, timeout=SECONDS) as client:
            for result in measure(client, given):
                print(json.dumps({"gbps": gbps, **result}), flush=True)


def measure(client: httpx.Client, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All methods over one link."""
    text = given.text.read_text("utf-8")[: 8 * (given.tokens + 97 * len(given.kv) * (given.repetitions + 1))]
    ids = client.post("/v1/tokenize", json={"prompt": text}).json()["tokens"]
    waits: dict[str, list[float]] = {method: [] for method in given.kv}
    steps: dict[str, list[float]] = {method: [] for method in given.kv}
    size: dict[str, float] = {}
    dense = 0.0
    bytes_before = 0
    for number in range(given.repetitions + 1):
        for index, method in enumerate(given.kv):
            start = (number * len(given.kv) + index) * 97
            times, dense = ask(client, given.model, method, ids[start : start + given.tokens])
            bytes_after = fetched(client, bytes_before)
            size[method], bytes_before = (bytes_after - bytes_before) / given.tokens, bytes_after
            if number:  # the first round warms up
                gaps = [b - a for a, b in pairwise(times)]
                waits[method].append(gaps[0])
                steps[method].append(statistics.median(gaps[1:]))
    for method in given.kv:
        wait, step = statistics.median(waits[method]), statistics.median(steps[method])
        yield {
            "kv": method,
            "wire_bytes_per_token": round(size[method]),
            "of_dense": round(size[method] / dense, 4),
            "wait_ms": round(1e3 * wait, 1),
            "step_ms": round(1e3 * step, 1),
            "handover_ms": round(1e3 * (wait - step), 1),
        }


if __name__ == "__main__":
    main()
