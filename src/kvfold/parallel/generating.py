"""Prompts to answers over several ranks, one sequence at a time, with the engine's sampler and detokenizer."""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvfold.config.progress import SILENT, Progress
from kvfold.engine.completion import Completion
from kvfold.engine.outputs import KVUsage, RequestMetrics, RequestOutput
from kvfold.engine.params import SamplingParams
from kvfold.engine.row_state import RowState
from kvfold.engine.sampler import Sampler
from kvfold.errors import ConfigError, ModelError
from kvfold.model.loading import LoadedModel
from kvfold.parallel.group import SequenceParallel, Usage


@dataclass(frozen=True)
class ParallelOutput:
    """request: as an engine would have given it, KV bytes summed over ranks; prefill: what each rank sent while it read
    the prompt, total: until the end."""

    request: RequestOutput
    prefill: list[Usage]
    total: list[Usage]


class ParallelGenerator:
    """Rank 0's generating loop. seed: of requests without one, as the engine's."""

    def __init__(self, group: SequenceParallel, model: LoadedModel, seed: int = 0) -> None:
        self._group, self._model, self._seed = group, model, seed
        self._sampler = Sampler()
        self._ids = itertools.count()

    def generate(
        self, token_ids: Sequence[int], params: SamplingParams, prompt: str | None = None, progress: Progress = SILENT
    ) -> ParallelOutput:
        """Completes one prompt.

        Raises PromptError or MemoryLimitError before any work, ConfigError for what only the engine does,
        ModelError for logits that nothing can be chosen from, ParallelError for a lost rank.
        """
        check_params(params)
        group, spec = self._group, self._model.spec
        params.check_vocabulary(spec.vocab)
        metrics = RequestMetrics(time.monotonic())
        limit = params.last_position(len(token_ids), spec.max_positions)
        request_id = str(next(self._ids))
        row = RowState.create(
            params,
            list(token_ids),
            eos_token_ids=spec.eos_token_ids,
            request_id=request_id,
            engine_seed=self._seed,
        )
        answer = Completion(row, self._model.tokenizer, limit)
        with progress.task("generating", limit) as advance:
            logits = group.prefill(token_ids, room=limit - len(token_ids))
            advance(len(token_ids))
            prefill = group.usage()
            while True:
                sampled = self._sampler.sample(logits[None], [row])
                token = sampled.token_ids[0]
                if token is None:
                    raise ModelError(str(sampled.errors[0]))
                metrics.first_token_time = metrics.first_token_time or time.monotonic()
                advance(1)
                if answer.take(token, sampled.logprobs[0]):
                    break
                logits = group.decode(token)
        metrics.finished_time = time.monotonic()
        total = group.usage()
        # The last token was sampled and not read.
        kv = KVUsage.of(sum(each.held for each in total), len(answer) - 1, spec.kv_elements)
        request = RequestOutput(request_id, prompt, list(token_ids), None, [answer.output], True, kv, metrics)
        return ParallelOutput(request, prefill, total)


def check_params(params: SamplingParams) -> None:
    """Raises ConfigError for parameters that one sequence over several ranks cannot have."""
    if params.n != 1:
        raise ConfigError(f"n={params.n} is not possible over several ranks; give n=1 or leave out --sequence-parallel")
    if params.prompt_logprobs is not None:
        raise ConfigError("prompt_logprobs are not computed over several ranks; leave out one of the two")
