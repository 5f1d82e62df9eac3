"""How fast little KV memory serves many requests: dense against methods that are admitted by compressed size.

    python benchmarks/limited_memory.py --text TEXT --kv none --kv 'batchmax(policy="snapkv",budget=512)'

All requests are there at once: `--requests` different pieces of the text, of `--prompt` tokens each, to be continued
by `--output` tokens. The memory is what the pages of `--dense-requests` of them take in a dense 16-bit cache. Prints
one JSON object per method; `speedup` is against the first one. On a machine shared with others compare
`requests_per_cpu_minute` with `--threads 1`.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from kvfold import LLM, SamplingParams
from kvfold.engine.lane import cache_shape
from kvfold.methods.base import PAGE_TOKENS
from kvfold.model.loading import load_spec
from kvfold.model.source import resolve_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--kv", action="append", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--dense-requests", type=int, default=4)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--calibration", type=Path)
    options = parser.parse_args()
    shape = cache_shape(load_spec(resolve_model(options.model)), 16)
    pages = shape.layers * shape.kv_heads * -(-(options.prompt + options.output) // PAGE_TOKENS)
    memory = options.dense_requests * pages * shape.page_bytes
    first = None
    for kv in options.kv:
        llm = LLM(options.model, kv=kv, kv_memory=memory, threads=options.threads, calibration=options.calibration)
        report = serve(llm, pieces(llm, options), options.output)
        first = first or report["seconds"]
        shown = {"kv": kv, "memory": memory, **report, "speedup": round(first / report["seconds"], 2)}
        print(json.dumps(shown), flush=True)


def pieces(llm: LLM, options: argparse.Namespace) -> list[list[int]]:
    """Prompts of equal length, none of which begins like another."""
    ids = llm.model.tokenizer(options.text.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    if len(ids) < options.requests * options.prompt:
        raise SystemExit(f"the text has {len(ids)} tokens; choose fewer --requests or a shorter --prompt")
    return [ids[i * options.prompt : (i + 1) * options.prompt] for i in range(options.requests)]


def serve(llm: LLM, prompts: list[list[int]], output: int) -> dict[str, Any]:
    """Runs all prompts as one batch, step by step, to see how many run at once."""
    engine = llm.engine
    params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
    for prompt in prompts:
        engine.add_request(prompt, params)
    began, worked, running = time.monotonic(), time.process_time(), []
    while engine.has_unfinished:
        engine.step()
        running.append(len(engine.scheduler.running))
    seconds = time.monotonic() - began
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(time.process_time() - worked, 1),
        "requests_per_cpu_minute": round(60 * len(prompts) / (time.process_time() - worked), 3),
        "output_tokens_per_s": round(engine.generated_tokens / seconds, 2),
        "most_running": max(running),
        "mean_running": round(sum(running) / len(running), 1),
        "preemptions": engine.scheduler.preemptions,
        "peak_bytes": engine.memory.pool.peak_in_use * engine.memory.pool.page_bytes,
    }


if __name__ == "__main__":
    main()
