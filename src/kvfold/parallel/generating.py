"""Prompts to answers over several ranks, one sequence at a time, with the engine's sampler and detokenizer."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvfold.config.progress import SILENT, Progress
from kvfold.engine.detokenizer import Detokenizer
from kvfold.engine.outputs import CompletionOutput, KVUsage, RequestMetrics, RequestOutput
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
        self._requests = 0

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
        output = CompletionOutput(0, logprobs=None if params.logprobs is None else [])
        limit = spec.max_positions - len(token_ids)
        most = limit if params.max_tokens is None else min(params.max_tokens, limit)
        row = RowState.create(
            params,
            list(token_ids),
            output_token_ids=output.token_ids,
            eos_token_ids=spec.eos_token_ids,
            request_id=str(self._requests),
            engine_seed=self._seed,
        )
        self._requests += 1
        text = Detokenizer(self._model.tokenizer, params)
        with progress.task("generating", len(token_ids) + most) as advance:
            logits = group.prefill(token_ids, room=most)
            advance(len(token_ids))
            prefill = group.usage()
            while True:
                sampled = self._sampler.sample(logits[None], [row])
                token, chosen = sampled.token_ids[0], sampled.logprobs[0]
                if token is None:
                    raise ModelError(str(sampled.errors[0]))
                metrics.first_token_time = metrics.first_token_time or time.monotonic()
                output.token_ids.append(token)
                if chosen is not None and output.logprobs is not None:
                    output.logprobs.append(chosen)
                    output.cumulative_logprob = (output.cumulative_logprob or 0.0) + chosen[token].logprob
                advance(1)
                if self._ends(token, row, text, params, output, most):
                    break
                logits = group.decode(token)
        metrics.finished_time = time.monotonic()
        text.finish()
        output.text = text.text
        total = group.usage()
        kv = self._usage(total, len(token_ids) + len(output.token_ids) - 1)
        request = RequestOutput(str(self._requests - 1), prompt, list(token_ids), None, [output], True, kv, metrics)
        return ParallelOutput(request, prefill, total)

    def _ends(
        self, token: int, row: RowState, text: Detokenizer, params: SamplingParams, output: CompletionOutput, most: int
    ) -> bool:
        """Whether the completion is finished by its newest token."""
        if token in row.stop_ids and len(output.token_ids) >= params.min_tokens:
            output.finish_reason, output.stop_reason = "stop", token if token in params.stop_ids else None
        else:
            text.push(token)
            if text.stopped_by is not None:
                output.finish_reason, output.stop_reason = "stop", text.stopped_by
            elif len(output.token_ids) >= most:
                output.finish_reason = "length"
        return output.finish_reason is not None

    def _usage(self, usage: list[Usage], tokens: int) -> KVUsage:
        elements = tokens * self._model.spec.kv_elements
        return KVUsage(sum(each.held for each in usage), 2 * elements, tokens, elements)


def check_params(params: SamplingParams) -> None:
    """Raises ConfigError for parameters that one sequence over several ranks cannot have."""
    if params.n != 1:
        raise ConfigError(f"n={params.n} is not possible over several ranks; give n=1 or leave out --sequence-parallel")
    if params.prompt_logprobs is not None:
        raise ConfigError("prompt_logprobs are not computed over several ranks; leave out one of the two")
