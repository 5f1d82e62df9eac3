"""The planner's simulator beside the real engine: the same requests at the same times, on one engine in this process.

    python -m benchmarks.planner_replay --profile profile.json --trace trace.csv --kv none --kv "zeroc(bits=4)" \\
        --lengths-scale 0.1 --requests 60 --rate 0.5 --rate 1 --ttft 2 --tpot 0.1

The prediction is made first. Time is that of the profile's clock: every step takes as long as it really takes, and
where there is nothing to do the clock is set to the next arrival instead of waiting for it. One JSON line per method
and rate: what was predicted and what was measured.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from kvfold import LLM
from kvfold.benchmark.trace import TraceRequest
from kvfold.config.size import parse_bytes
from kvfold.engine.engine import Engine
from kvfold.engine.params import SamplingParams
from kvfold.planner.document import Profile, load_profile
from kvfold.planner.placement import Placement
from kvfold.planner.records import Limits, RequestRecord, SimulationResult, summarize
from kvfold.planner.simulator import simulate
from kvfold.planner.workload import at_rate, load_requests

SEEDS = itertools.count(1)
"""Of prompts: none comes twice, so that no prefix is known."""


def replay_parser(about: str | None, requests: int, ttft: float = 2.0, tpot: float = 0.1) -> argparse.ArgumentParser:
    """Options that all replays have, with these defaults."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--kv", action="append", required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--kv-memory", default="1GiB")
    parser.add_argument("--lengths-scale", type=float, default=0.1)
    parser.add_argument("--requests", type=int, default=requests)
    parser.add_argument("--rate", type=float, action="append", required=True)
    parser.add_argument("--ttft", type=float, default=ttft)
    parser.add_argument("--tpot", type=float, default=tpot)
    return parser


def unlike_requests(options: argparse.Namespace, profile: Profile) -> list[TraceRequest]:
    """A trace's requests, of which no two begin alike: `prompt` makes their tokens."""
    asked, _ = load_requests(
        options.trace, profile.positions, count=options.requests, lengths_scale=options.lengths_scale
    )
    return [replace(request, hash_ids=()) for request in asked]


def main() -> None:
    options = replay_parser(__doc__, requests=60).parse_args()
    profile, memory = load_profile(options.profile), parse_bytes(options.kv_memory)
    limits = Limits(options.ttft, options.tpot)
    asked = unlike_requests(options, profile)
    llm = build(profile, options.model, options.kv, memory)
    for rate in options.rate:
        for lane, kv in enumerate(options.kv):
            timed = at_rate(asked, rate)
            predicted = simulate(timed, Placement(mixed=1), profile.of(kv), profile.limits, memory)
            clock = time.process_time if profile.machine.clock == "cpu" else time.perf_counter
            measured = replay(llm.engine, timed, lane, llm.model.decoder.spec.vocab, clock)
            rows = {"predicted": row(predicted, limits), "measured": row(measured, limits)}
            print(json.dumps({"kv": kv, "rate": rate, **rows}), flush=True)


def build(profile: Profile, model: str, methods: Sequence[str], memory: int) -> LLM:
    """The engine as it was when it was profiled."""
    own = profile.limits
    llm = LLM(
        model,
        kv=list(methods),
        kv_memory=memory,
        dtype=profile.dtype,
        kv_dtype=profile.kv_dtype,
        weights=profile.weights,
        threads=profile.machine.threads,
        chunk=own.chunk,
        max_batch_tokens=own.max_batch_tokens,
        max_sequences=own.max_sequences,
        prefix_caching=own.prefix_caching,
    )
    llm.generate(["A page belongs to one sequence."], SamplingParams(max_tokens=4, ignore_eos=True))
    return llm


def replay(
    engine: Engine, requests: Sequence[TraceRequest], lane: int, vocab: int, clock: Callable[[], float]
) -> SimulationResult:
    """What became of requests that were given to the engine at their times, or as soon after as a step allowed."""
    waiting = sorted(enumerate(requests), key=lambda pair: pair[1].at)
    records: dict[str, RequestRecord] = {}
    now, steps = 0.0, 0
    while waiting or engine.has_unfinished:
        while waiting and waiting[0][1].at <= now:
            index, request = waiting.pop(0)
            seed = next(SEEDS)
            ids = prompt(seed, request.input_tokens, vocab)
            params = SamplingParams(temperature=0.0, max_tokens=request.output_tokens, ignore_eos=True)
            key = engine.add_request(ids, params, lane=lane, context=len(ids))
            records[key] = RequestRecord(index, request.at, request.input_tokens, request.output_tokens, None, None)
        if not engine.has_unfinished:
            now = waiting[0][1].at
            continue
        start = clock()
        outputs = engine.step()
        now += clock() - start
        steps += 1
        for output in outputs:
            record = records[output.request_id]
            first = now if record.first is None else record.first
            records[output.request_id] = replace(record, first=first, last=now if output.finished else None)
    ordered = tuple(sorted(records.values(), key=lambda record: record.index))
    pool = engine.memory.pool
    return SimulationResult(ordered, (pool.peak_in_use,), pool.page_bytes, steps, 0, now, True)


def prompt(seed: int, length: int, vocab: int) -> list[int]:
    """Token ids that no other seed's begin with."""
    return [(7919 * seed + 31 * t) % vocab for t in range(length)]


def row(result: SimulationResult, limits: Limits) -> dict[str, float | None]:
    summary = summarize(result, limits)
    return {
        "attainment": summary.attainment,
        "ttft_mean": None if summary.ttft is None else round(summary.ttft.mean, 4),
        "ttft_p90": None if summary.ttft is None else round(summary.ttft.p90, 4),
        "tpot_mean": None if summary.tpot is None else round(summary.tpot.mean, 5),
        "tpot_p90": None if summary.tpot is None else round(summary.tpot.p90, 5),
        "steps": summary.steps,
        "duration": round(summary.duration, 1),
    }


if __name__ == "__main__":
    main()
