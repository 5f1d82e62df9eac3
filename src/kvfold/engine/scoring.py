"""How well a model predicts text through a lane's cache, on the same path as generation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvfold.config.progress import SILENT, Progress
from kvfold.engine.engine import Engine
from kvfold.engine.params import SamplingParams

_PARAMS = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)


@dataclass(frozen=True)
class Score:
    """Negative log-likelihood summed over `tokens` predicted tokens; KV bytes summed over the sequences' ends."""

    nll: float
    tokens: int
    kv_bytes: int
    dense_kv_bytes: int
    elements: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll / self.tokens)


def score(
    engine: Engine,
    windows: Sequence[list[int]],
    *,
    lane: int = 0,
    context: int | None = None,
    what: str = "scoring",
    progress: Progress = SILENT,
) -> Score:
    """Runs each window (token ids, at least 2) as one request; the first token of each is not predicted.

    context: first tokens of each window that are not scored, and that a staged method compresses before the others
    are read.
    """
    for window in windows:
        engine.add_request(window, _PARAMS, lane=lane, context=context)
    nll, tokens, kv_bytes, dense, elements = 0.0, 0, 0, 0, 0
    with progress.task(what, len(windows)) as advance:
        while engine.has_unfinished:
            for output in engine.step():
                found = (output.prompt_logprobs or [])[max(1, context or 0) :]
                given = [next(iter(entry.values())).logprob for entry in found if entry]
                nll -= math.fsum(given)
                tokens += len(given)
                kv_bytes += output.kv.bytes
                dense += output.kv.dense_bytes
                elements += output.kv.elements
                advance()
    return Score(nll, tokens, kv_bytes, dense, elements)
