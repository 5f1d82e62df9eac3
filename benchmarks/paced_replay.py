"""The planner's simulator beside real workers whose steps take as long as a profile says: is the rest of it right?

    python -m benchmarks.paced_replay --profile profile.json --factor 2 --trace trace.csv --lengths-scale 0.1 \\
        --placement "disaggregated(prefill=1,decode=1)" --kv none --rate 0.25 --requests 50 --ttft 3 --tpot 0.3

On a processor that others share a step takes what they leave it, and near saturation a few per cent decide how long
the queue is. Here the router, the engines, their pages and the sockets between them are the real ones, but every step
waits until `--factor` times what the profile says has passed. What then differs from the prediction is not the
latency model's doing. `overrun`: of all steps' time, the share that came on top because computing took longer still.
"""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from functools import partial
from typing import Any

from benchmarks.planner_replay import SEEDS, build, prompt, replay_parser, row, unlike_requests
from kvfold.benchmark.trace import TraceRequest
from kvfold.cluster.tcp import TcpTransport
from kvfold.config.size import parse_bytes
from kvfold.engine.engine import Engine
from kvfold.engine.handover import Outgoing
from kvfold.engine.params import SamplingParams
from kvfold.engine.runner import StepResult
from kvfold.engine.scheduler import Scheduled
from kvfold.planner.document import load_profile
from kvfold.planner.latency import LatencyModel, StepWork, chunk_squares
from kvfold.planner.placement import Link, parse_placement
from kvfold.planner.records import Limits, RequestRecord, SimulationResult
from kvfold.planner.simulator import simulate
from kvfold.planner.workload import at_rate
from kvfold.server.messages import Add, Rejected
from tests.cluster.local import Cluster, cluster

PATIENCE = 600.0  # seconds without a token


class Pace:
    """Makes the steps of an engine as long as a latency model says."""

    def __init__(self, engine: Engine, latency: LatencyModel) -> None:
        self.taken = self.overrun = 0.0  # seconds
        self._run, self._latency = engine._runner.run, latency
        self._page_bytes = engine.memory.pool.page_bytes
        engine._runner.run = self._paced  # type: ignore[method-assign]

    def _paced(self, scheduled: Sequence[Scheduled], outgoing: Mapping[str, Outgoing] | None = None) -> StepResult:
        seconds = self._latency.seconds(self._work(scheduled))
        began = time.monotonic()
        result = self._run(scheduled, outgoing)
        left = began + seconds - time.monotonic()
        time.sleep(max(0.0, left))
        overrun = max(0.0, -left)
        self.taken += seconds + overrun
        self.overrun += overrun
        return result

    def _work(self, scheduled: Sequence[Scheduled]) -> StepWork:
        tokens = squares = pages = batch = 0
        for item in scheduled:
            sequence = item.sequence
            if item.count == 1 and sequence.output.token_ids and sequence.computed == len(sequence) - 1:
                pages += len(sequence.held.pages())
                batch += 1
            else:
                tokens += item.count
                squares += chunk_squares(sequence.computed, item.count)
        return StepWork(tokens, squares, pages * self._page_bytes, batch)


def slower(latency: LatencyModel, factor: float) -> LatencyModel:
    costs = (latency.prefill, latency.decode, latency.decode_above)
    return LatencyModel(*(cost and type(cost)(*(factor * x for x in astuple(cost))) for cost in costs), latency.knee)


def main() -> None:
    parser = replay_parser(__doc__, requests=50, ttft=3.0, tpot=0.3)
    parser.add_argument("--factor", type=float, default=2.0)
    parser.add_argument("--placement", default="disaggregated(prefill=1,decode=1)")
    parser.add_argument("--link-gbps", type=float, default=1.0)
    options = parser.parse_args()
    profile, placement = load_profile(options.profile), parse_placement(options.placement)
    memory, link = parse_bytes(options.kv_memory), Link(options.link_gbps)
    asked = unlike_requests(options, profile)
    limits = Limits(options.ttft, options.tpot)
    transport = partial(TcpTransport, gbps=link.gbps)
    roles = {"prefill": placement.prefill, "decode": placement.decode or placement.mixed}
    for kv in options.kv:
        method = profile.of(kv)
        method = replace(method, latency=slower(method.latency, options.factor))
        workers = placement.prefill + placement.decode + placement.mixed
        engines = [build(profile, options.model, [kv], memory).engine for _ in range(workers)]
        paces = [Pace(engine, method.latency) for engine in engines]
        for rate in options.rate:
            timed = at_rate(asked, rate)
            predicted = row(simulate(timed, placement, method, profile.limits, memory, link), limits)
            for pace in paces:
                pace.taken = pace.overrun = 0.0
            measured = row(asyncio.run(replay(engines, transport, timed, roles)), limits)
            overrun = sum(p.overrun for p in paces) / sum(p.taken for p in paces)
            figures = {"predicted": predicted, "measured": measured, "overrun": round(overrun, 4)}
            print(json.dumps({"kv": kv, "rate": rate, **figures}), flush=True)


async def replay(
    engines: Sequence[Engine], transport: Any, requests: Sequence[TraceRequest], roles: dict[str, int]
) -> SimulationResult:
    """What became of requests that came to a router at their times."""
    made = iter([engines[0], *engines])  # the first one is only asked for its lanes
    async with cluster(lambda: next(made), transport, **roles) as running:
        vocab, began = engines[0]._spec.vocab, time.monotonic()
        asked = [
            ask(running, index, request, prompt(next(SEEDS), request.input_tokens, vocab), began)
            for index, request in enumerate(requests)
        ]
        records = await asyncio.gather(*asked)
        return SimulationResult(tuple(records), (0,), 0, 0, 0, time.monotonic() - began, True)


async def ask(running: Cluster, index: int, request: TraceRequest, ids: list[int], began: float) -> RequestRecord:
    await asyncio.sleep(began + request.at - time.monotonic())
    params = SamplingParams(temperature=0.0, max_tokens=request.output_tokens, ignore_eos=True)
    first = None
    async for event in running.events(Add(str(index), ids, params, 0, context=len(ids)), PATIENCE):
        if isinstance(event, Rejected):
            raise SystemExit(f"request {index} was refused: {event.message}")
        now = time.monotonic() - began
        first = now if first is None and event.pieces else first
    return RequestRecord(index, request.at, request.input_tokens, request.output_tokens, first, now)


if __name__ == "__main__":
    main()
