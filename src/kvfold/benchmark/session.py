"""A whole benchmark: ask the server, make the workload, run it once per method, report."""

import asyncio
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

import httpx2

from kvfold import __version__
from kvfold.benchmark.client import ROUTES, allow_connections, open_clients, stream_completion
from kvfold.benchmark.corpus import load_corpus
from kvfold.benchmark.load import Load, offer_load
from kvfold.benchmark.measures import summarize
from kvfold.benchmark.options import Limits, TargetOptions, WorkloadOptions
from kvfold.benchmark.outcome import Outcome
from kvfold.benchmark.probe import Server, probe
from kvfold.benchmark.prompts import PromptBuilder
from kvfold.benchmark.report import Report, Run
from kvfold.benchmark.workload import PlannedRequest, Workload, build_workload, load_sizes
from kvfold.config.progress import SILENT, Progress

WARMUP_AT_ONCE = 8


async def run_benchmark(
    target: TargetOptions, options: WorkloadOptions, limits: Limits, *, progress: Progress = SILENT
) -> Report:
    """Measure a server. Ctrl-C ends a run early and reports what was measured; a second one is KeyboardInterrupt.

    Raises BenchmarkError, TraceError or ConfigError for what cannot be measured, before any load is sent.
    """
    corpus = load_corpus(options.dataset)
    sizes = load_sizes(options, corpus)
    connections = min(options.requests, options.concurrency or options.requests)
    allow_connections(connections)
    async with open_clients(target, connections) as clients:
        server = await probe(clients[0], target)
        builder = PromptBuilder(corpus, server.counter, options.seed)
        workload = await build_workload(
            options, sizes, builder, overhead=server.overhead, context=server.context, progress=progress
        )
        runs = []
        stop = asyncio.Event()
        with _on_interrupt(stop.set):
            methods: list[str | None] = list(target.kv) or [None]
            for kv in methods:
                if not stop.is_set():
                    load = await _run(clients, target, options, server, workload, kv, stop, progress)
                    runs.append(Run(kv, summarize(load, limits), load.outcomes))
    return Report(
        _title(options, server, workload),
        _settings(target, options, limits, server, workload),
        list(_notes(options, server, workload)),
        runs,
    )


async def _run(
    clients: Sequence[httpx2.AsyncClient],
    target: TargetOptions,
    options: WorkloadOptions,
    server: Server,
    workload: Workload,
    kv: str | None,
    stop: asyncio.Event,
    progress: Progress,
) -> Load:
    async def send(request: PlannedRequest, outcome: Outcome, clock: Callable[[], float]) -> None:
        body = server.dialect.body(target.endpoint, server.model, kv, request.prompt, request.output_tokens)
        http = clients[request.index % len(clients)]
        await stream_completion(http, ROUTES[target.endpoint], body, outcome, timeout=target.timeout, clock=clock)

    async def offer(what: str, plan: list[PlannedRequest], concurrency: int | None, closed_loop: bool) -> Load:
        with progress.task(f"{what} {kv or ''}".strip(), total=len(plan)) as advance:
            return await offer_load(
                plan, send, concurrency=concurrency, closed_loop=closed_loop, stop=stop, advance=advance
            )

    if workload.warmup:
        await offer("warming up", workload.warmup, options.concurrency or WARMUP_AT_ONCE, True)
    return await offer("requests", workload.requests, options.concurrency, options.closed_loop)


@contextmanager
def _on_interrupt(act: Callable[[], None]) -> Iterator[None]:
    """`act` on the first Ctrl-C; the next one is Python's again. Where signals are not ours, nothing changes."""
    loop = asyncio.get_running_loop()

    def once() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        act()

    # Only the main thread of a Unix process may set a handler.
    with suppress(NotImplementedError, RuntimeError, ValueError):
        loop.add_signal_handler(signal.SIGINT, once)
    try:
        yield
    finally:
        with suppress(NotImplementedError, RuntimeError, ValueError):
            loop.remove_signal_handler(signal.SIGINT)


def _title(options: WorkloadOptions, server: Server, workload: Workload) -> str:
    requests = workload.requests
    inputs, outputs = fmean(r.input_tokens for r in requests), fmean(r.output_tokens for r in requests)
    lengths = f"{len(requests):,} requests, {inputs:,.0f} prompt and {outputs:,.0f} output tokens on average"
    return f"{server.model}: {lengths}, {_arrivals(options)}"


def _arrivals(options: WorkloadOptions) -> str:
    limit = "" if options.concurrency is None else f", at most {options.concurrency} at once"
    if options.closed_loop:
        return f"{options.concurrency} at once (closed loop)"
    if options.trace is not None and options.rate is None:
        return f"times of {options.trace.name} x {options.speed:g} speed{limit}"
    if options.rate is None or options.rate == float("inf"):
        return "all at once"
    process = "Poisson" if options.burstiness == 1 else f"gamma ({options.burstiness:g})"
    return f"{process} arrivals, {options.rate:g} requests/s{limit}"


def _notes(options: WorkloadOptions, server: Server, workload: Workload) -> Iterator[str]:
    if options.trace is not None:
        last = options.first + len(workload.requests) - 1
        yield f"lengths are {options.scale:g} of those of {options.trace.name}, requests {options.first} to {last}"
    if workload.capped:
        yield f"{workload.capped:,} requests were cut to the context of {server.context:,} tokens"
    if not workload.exact:
        yield "the server has no tokenizer route: prompt lengths were estimated from characters"
    if not server.dialect.exact:
        yield "answers end where the model ends them (ignore_eos off, or not taken by the server)"


def _settings(
    target: TargetOptions, options: WorkloadOptions, limits: Limits, server: Server, workload: Workload
) -> dict[str, Any]:
    """What must be known to repeat the benchmark; never the API key."""
    asked = {name: value for name, value in asdict(target).items() if name != "api_key"}
    return {
        "kvfold": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "target": asked,
        "workload": asdict(options),
        "limits": asdict(limits),
        "server": {
            "model": server.model,
            "context": server.context,
            "template_tokens": server.overhead,
            **asdict(server.dialect),
        },
        "corpus": workload.corpus,
        "capped": workload.capped,
    }


def benchmark(
    target: TargetOptions, options: WorkloadOptions, limits: Limits, *, progress: Progress = SILENT
) -> Report:
    """`run_benchmark` in an event loop of its own."""
    return asyncio.run(run_benchmark(target, options, limits, progress=progress))
