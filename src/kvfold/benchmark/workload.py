"""From options to requests: each with its time, its prompt and the length of its answer."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from random import Random

from kvfold.benchmark.arrivals import arrival_times
from kvfold.benchmark.corpus import Corpus
from kvfold.benchmark.lengths import DEFAULT_INPUT, DEFAULT_OUTPUT, fit_context, scaled
from kvfold.benchmark.options import WorkloadOptions
from kvfold.benchmark.prompts import Passage, PromptBuilder
from kvfold.benchmark.trace import BLOCK_TOKENS, TraceRequest, read_trace
from kvfold.config.progress import SILENT, Progress

AT_ONCE = 8
"""Prompts that are made at the same time: enough to hide the way to the tokenizer."""


@dataclass(frozen=True)
class Sizes:
    """One request before its prompt is made; `prompt` is set where a data set has it ready."""

    at: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()
    prompt: str | None = None


@dataclass(frozen=True)
class PlannedRequest:
    """One request to send at `at` seconds. input_tokens: the server's count that is expected, template included."""

    index: int
    at: float
    prompt: str
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Workload:
    """What will be sent. capped: requests cut to the model's context. exact: prompts were counted by a tokenizer."""

    requests: list[PlannedRequest]
    warmup: list[PlannedRequest]
    corpus: str
    capped: int
    exact: bool


def load_sizes(options: WorkloadOptions, corpus: Corpus) -> list[Sizes]:
    """Times and lengths, before any server is asked. Raises TraceError or ConfigError for what cannot be read."""
    rng = Random(f"{options.seed} sizes")
    if options.trace is None:
        sizes = _drawn(options, corpus, rng)
    else:
        trace = read_trace(options.trace, options.first, options.requests)
        sizes = [_of_trace(request, options) for request in trace]
    if options.trace is not None and options.rate is None:
        return sizes
    rate = float("inf") if options.rate is None else options.rate
    times = arrival_times(len(sizes), rate, options.burstiness, rng)
    return [
        Sizes(at, s.input_tokens, s.output_tokens, s.hash_ids, s.prompt) for at, s in zip(times, sizes, strict=True)
    ]


def _of_trace(request: TraceRequest, options: WorkloadOptions) -> Sizes:
    return Sizes(
        request.at / options.speed,
        scaled(request.input_tokens, options.scale),
        scaled(request.output_tokens, options.scale),
        () if options.shared_prefix else request.hash_ids,
    )


def _drawn(options: WorkloadOptions, corpus: Corpus, rng: Random) -> list[Sizes]:
    outputs = options.output_tokens or DEFAULT_OUTPUT
    if corpus.prompts and options.input_tokens is None and not options.shared_prefix:
        # A data set of prompts is asked as it is, from the beginning again where it is too short.
        return [Sizes(0, 0, outputs.draw(rng), prompt=p) for p in islice(cycle(corpus.prompts), options.requests)]
    inputs = options.input_tokens or DEFAULT_INPUT
    return [Sizes(0, inputs.draw(rng), outputs.draw(rng)) for _ in range(options.requests)]


async def build_workload(
    options: WorkloadOptions,
    sizes: Sequence[Sizes],
    builder: PromptBuilder,
    *,
    overhead: int = 0,
    context: int | None = None,
    progress: Progress = SILENT,
) -> Workload:
    """Make all prompts.

    overhead: tokens that the chat template adds to a prompt, so that the server's count is the wanted one.
    context: most tokens of prompt and answer together. Warm-up requests have the first lengths and texts of their own.
    """
    room = None if context is None else context - overhead
    room = None if context is None else context - overhead
    texts = [max(1, size.input_tokens - overhead) for size in sizes]
    fitted = [fit_context(text, size.output_tokens, room) for text, size in zip(texts, sizes, strict=True)]
    capped = sum((text, size.output_tokens) != fit for text, size, fit in zip(texts, sizes, fitted, strict=True))
    gate = asyncio.Semaphore(AT_ONCE)

    async def plan(index: int, size: Sizes, fit: tuple[int, int], warmup: bool) -> PlannedRequest:
        async with gate:
            passage = await _make(builder, options, index, size, fit[0], warmup)
        advance()
        return PlannedRequest(index, size.at, passage.text, passage.tokens + overhead, fit[1])

    planned = list(enumerate(zip(sizes, fitted, strict=True)))
    warm = list(islice(cycle(planned), options.warmup))
    with progress.task("making prompts", total=len(planned) + len(warm)) as advance:
        requests = await asyncio.gather(*(plan(i, size, fit, False) for i, (size, fit) in planned))
        warming = await asyncio.gather(*(plan(n, size, fit, True) for n, (_, (size, fit)) in enumerate(warm)))
    return Workload(requests, warming, builder.corpus.name, capped, builder.counter.exact)


async def _make(
    builder: PromptBuilder, options: WorkloadOptions, index: int, size: Sizes, tokens: int, warmup: bool
) -> Passage:
    if size.prompt is not None:
        return await builder.ready(size.prompt)
    if warmup:
        return await builder.unique(f"warm-up {index}", tokens)
    if size.hash_ids:
        return await builder.blocks(size.hash_ids, scaled(BLOCK_TOKENS, options.scale), tokens)
    if options.shared_prefix:
        return await builder.shared(options.shared_prefix, f"request {index}", tokens)
    return await builder.unique(f"request {index}", tokens)
