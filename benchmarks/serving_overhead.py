"""What HTTP, scheduling and detokenising cost: the server's throughput against the offline engine's.

    python -m benchmarks.serving_overhead [--kv METHOD] [--requests 16] [--input 256] [--output 64] [--rounds 3]

Both run the same prompts greedily, all at once, in turns, so that a busy machine disturbs both alike; prompts differ
from round to round, so that no prefix is found again. Prints one JSON object: output tokens/s of every round, and the
median of their ratios.
"""

import argparse
import asyncio
import json
import random
import statistics
import time

import httpx

from benchmarks.serving import serving
from kvfold import LLM, SamplingParams

SETTINGS = {"chunk": 256, "max_batch_tokens": 512}  # the server's defaults


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kv", default="none")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--input", type=int, default=256)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    llm = LLM(kv=options.kv, **SETTINGS)
    with serving("--kv", options.kv) as (url, _):
        rounds = [measure(llm, url, seed, options) for seed in range(options.rounds + 1)][1:]  # the first warms up
    ratios = [r["served"] / r["offline"] for r in rounds]
    print(
        json.dumps({"settings": vars(options), "rounds": rounds, "median_ratio": statistics.median(ratios)}, indent=2)
    )


def measure(llm: LLM, url: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Output tokens per second, offline and served, of one set of random prompts."""
    generator = random.Random(seed)
    vocab = llm.model.spec.vocab
    prompts = [[generator.randrange(100, vocab) for _ in range(options.input)] for _ in range(options.requests)]
    tokens = options.requests * options.output
    params = SamplingParams(temperature=0, max_tokens=options.output, ignore_eos=True)
    began = time.perf_counter()
    llm.generate(prompts, params)
    offline = tokens / (time.perf_counter() - began)
    began = time.perf_counter()
    asyncio.run(ask_all(url, prompts, options.output))
    return {"offline": offline, "served": tokens / (time.perf_counter() - began)}


async def ask_all(url: str, prompts: list[list[int]], output: int) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        await asyncio.gather(*(ask(client, prompt, output) for prompt in prompts))


async def ask(client: httpx.AsyncClient, prompt: list[int], output: int) -> None:
    """One streamed completion, read to its end."""
    body = {"prompt": prompt, "max_tokens": output, "temperature": 0, "ignore_eos": True, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        lines = [line async for line in response.aiter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]", lines[-1]


if __name__ == "__main__":
    main()
