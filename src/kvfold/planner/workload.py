"""Requests to simulate, from a trace: scaled, cut to what the model takes, refused where memory never holds them."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kvfold.benchmark.lengths import fit_context, scaled
from kvfold.benchmark.trace import BLOCK_TOKENS, TraceRequest, read_trace
from kvfold.config.size import format_bytes
from kvfold.planner.errors import PlacementError
from kvfold.planner.pages import PageArithmetic
from kvfold.planner.records import arrival_rate


def load_requests(
    trace: Path, positions: int, *, first: int = 0, count: int | None = None, lengths_scale: float = 1.0
) -> tuple[list[TraceRequest], int]:
    """Requests of a trace, and how many of them were cut to the model's positions.

    Where lengths are scaled, so are the blocks that prompts share, as `kvfold bench serve` scales them.

    Raises TraceError, PlacementError.
    """
    if not 0 < lengths_scale < math.inf:
        raise PlacementError(f"--lengths-scale {lengths_scale:g} is no factor; give a number above 0")
    if first < 0 or (count is not None and count < 1):
        raise PlacementError("--from and --requests name no part of the trace; give 0 or more, and 1 or more")
    cut = 0
    requests = []
    for request in read_trace(trace, first, count):
        wanted = scaled(request.input_tokens, lengths_scale), scaled(request.output_tokens, lengths_scale)
        prompt, outputs = fit_context(*wanted, positions)
        cut += (prompt, outputs) != wanted
        requests.append(
            TraceRequest(request.at, prompt, outputs, request.hash_ids, scaled(BLOCK_TOKENS, lengths_scale))
        )
    return requests, cut


def at_rate(requests: Sequence[TraceRequest], rate: float) -> list[TraceRequest]:
    """The same requests, `rate` of them per second: the gaps keep their proportions, and so their bursts.

    Raises PlacementError where all come at once, or the rate is none.
    """
    if not 0 < rate < math.inf:
        raise PlacementError(f"a rate of {rate:g} requests per second cannot be played; give a number above 0")
    own = arrival_rate([request.at for request in requests])
    if own == math.inf:
        raise PlacementError("all requests of the trace come at one moment, so it has no rate; take more --requests")
    return [replace(request, at=request.at * own / rate) for request in requests]


def check_memory(requests: Sequence[TraceRequest], arithmetic: PageArithmetic, pages: int) -> None:
    """Raises PlacementError for a prompt that a worker's memory never holds, as the engine would refuse it."""
    longest = max(request.input_tokens for request in requests)
    if arithmetic.longest(pages, longest + 1, longest) > longest:
        return
    need = arithmetic.layout.most_pages(longest + 1, 1, longest) * arithmetic.page_bytes
    raise PlacementError(
        f"a prompt of {longest} tokens needs {format_bytes(need)} of KV memory, a worker has "
        f"{format_bytes(pages * arithmetic.page_bytes)}; raise --kv-memory, lower --lengths-scale or compress more"
    )
