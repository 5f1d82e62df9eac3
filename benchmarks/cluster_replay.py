"""The planner's simulator beside a real cluster: the same requests at the same times, over HTTP.

    python -m benchmarks.cluster_replay --profile profile.json --trace trace.csv --lengths-scale 0.1 \\
        --placement "disaggregated(prefill=1,decode=1)" --kv none --kv "zeroc(bits=4)" --rate 1 --rate 2 \\
        --requests 100 --ttft 2 --tpot 0.1

All predictions are made, and printed, before the cluster is started: workers as they were profiled, behind
`kvfold serve`. One JSON line per method and rate for what is predicted, and one with what was then measured. Every
rate has prompts of its own, so that no prefix is known but those that the trace's requests share.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.planner_replay import replay_parser, row
from benchmarks.serving import serving
from kvfold.benchmark.options import Limits as Targets
from kvfold.benchmark.options import TargetOptions, WorkloadOptions
from kvfold.benchmark.report import Run
from kvfold.benchmark.session import benchmark
from kvfold.benchmark.trace import TraceRequest
from kvfold.config.size import parse_bytes
from kvfold.planner.company import Surroundings
from kvfold.planner.document import Profile, load_profile
from kvfold.planner.placement import Link, Placement, parse_placement
from kvfold.planner.records import Limits, RequestRecord, SimulationResult, arrival_rate
from kvfold.planner.simulator import simulate
from kvfold.planner.workload import at_rate, load_requests

Figures = dict[str, float | None]


@dataclass(frozen=True)
class Replay:
    """What is asked of both: the requests of a trace, at several rates."""

    trace: Path
    first: int
    scale: float
    requests: list[TraceRequest]
    rates: list[float]
    limits: Limits

    @property
    def own_rate(self) -> float:
        return arrival_rate([request.at for request in self.requests])


def main() -> None:
    parser = replay_parser(__doc__, requests=100)
    parser.add_argument("--placement", default="disaggregated(prefill=1,decode=1)")
    parser.add_argument("--transport", default="tcp")
    parser.add_argument("--link-gbps", type=float, default=10.0)
    parser.add_argument("--request-overhead", type=float, default=0.0)
    parser.add_argument("--slowdown", type=float, default=0.0)
    parser.add_argument("--from", dest="first", type=int, default=0)
    options = parser.parse_args()
    profile, placement = load_profile(options.profile), parse_placement(options.placement)
    asked, _ = load_requests(
        options.trace,
        profile.positions,
        first=options.first,
        count=options.requests,
        lengths_scale=options.lengths_scale,
    )
    limits = Limits(options.ttft, options.tpot)
    replay = Replay(options.trace, options.first, options.lengths_scale, asked, options.rate, limits)
    memory = parse_bytes(options.kv_memory)
    around = Link(options.link_gbps), Surroundings(options.request_overhead, options.slowdown)
    cases = [(kv, rate) for rate in replay.rates for kv in options.kv]
    predicted = {(kv, rate): predict(profile, placement, replay, kv, rate, memory, *around) for kv, rate in cases}
    for (kv, rate), figures in predicted.items():
        show(kv, rate, predicted=figures)
    command = ["--model", options.model, "--kv-memory", options.kv_memory, "--transport", options.transport]
    command += [part for kv in options.kv for part in ("--kv", kv)]
    if options.transport == "tcp":
        command += ["--link-gbps", str(options.link_gbps)]
    with serving(*command, *workers(profile, placement)) as (url, _):
        for kv, rate in cases:
            measured = ask(url, replay, kv, rate)
            show(kv, rate, predicted=predicted[kv, rate], measured=measured)


def show(kv: str, rate: float, **figures: Figures) -> None:
    print(json.dumps({"kv": kv, "rate": rate, **figures}), flush=True)


def predict(
    profile: Profile, placement: Placement, replay: Replay, kv: str, rate: float, memory: int, *around: Any
) -> Figures:
    timed = at_rate(replay.requests, rate)
    return row(simulate(timed, placement, profile.of(kv), profile.limits, memory, *around), replay.limits)


def workers(profile: Profile, placement: Placement) -> list[str]:
    """Options of `kvfold serve` for the placement's workers, each as it was profiled."""
    own = profile.limits
    options = {
        "prefill-workers": placement.prefill,
        "decode-workers": placement.decode or placement.mixed,
        "threads": profile.machine.threads,
        "dtype": profile.dtype,
        "weights": profile.weights,
        "chunk": own.chunk,
        "max-batch-tokens": own.max_batch_tokens,
        "max-sequences": own.max_sequences,
    }
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def ask(url: str, replay: Replay, kv: str, rate: float) -> Figures:
    """What became of the requests on the cluster."""
    target = TargetOptions(url, kv=(kv,), endpoint="completions")
    workload = WorkloadOptions(
        requests=len(replay.requests),
        trace=replay.trace,
        first=replay.first,
        scale=replay.scale,
        speed=rate / replay.own_rate,
        seed=replay.rates.index(rate) + 1,
        warmup=2,
    )
    report = benchmark(target, workload, Targets(replay.limits.ttft, replay.limits.tpot))
    return row(records_of(report.runs[0]), replay.limits)


def records_of(run: Run) -> SimulationResult:
    """A measured run as if it had been simulated, so that both are judged by the same rules."""
    if run.summary.completed < run.summary.requests:
        raise SystemExit(f"{run.summary.failed} requests failed: {run.summary.errors}")
    records = tuple(
        RequestRecord(o.index, o.scheduled, o.wanted_input, o.output_tokens, o.first, o.ended) for o in run.outcomes
    )
    return SimulationResult(records, (0,), 0, 0, 0, run.summary.duration, True)


if __name__ == "__main__":
    main()
