"""One sample read through one lane of an engine: how the right answer is predicted, and what is answered instead."""

from dataclasses import dataclass

from torch import Tensor

from kvfold.engine.engine import Engine
from kvfold.engine.outputs import KVUsage, RequestOutput
from kvfold.engine.params import SamplingParams
from kvfold.engine.sequence import LogitsTap
from kvfold.errors import ModelError
from kvfold.evaluation.likelihood import AnswerTap, Likelihood
from kvfold.evaluation.tasks.base import EncodedSample

_FORCED = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)


@dataclass(frozen=True)
class Reading:
    """answer: likelihood of the right one; logprobs: float32 [A, V], only of the dense cache; kv: held when the right
    answer had been read; generated: text and token ids where the task asks for them."""

    answer: Likelihood
    logprobs: Tensor | None
    kv: KVUsage
    text: str = ""
    token_ids: tuple[int, ...] = ()


def read(
    engine: Engine, lane: int, sample: EncodedSample, *, generate: int, query_aware: bool, reference: Tensor | None
) -> Reading:
    """Reads context, question and right answer; then, if the task wants it, lets the model answer by itself.

    query_aware: the method compresses when it has read the question, too, but for its last token, which has to predict
    the answer through the compressed cache; else it compresses before the question. reference: the dense cache's
    `logprobs`; None where this is the dense cache.
    Raises ModelError where the model gives no numbers.
    """
    prompt = sample.prompt
    context = max(len(prompt) - 1, len(sample.context)) if query_aware else len(sample.context)
    tap = AnswerTap(sample.answer, len(prompt) - 1, reference)
    forced = _run(engine, lane, prompt + sample.answer, _FORCED, context, LogitsTap(tap.start, tap.receive))
    reading = Reading(tap.result(), tap.logprobs, forced.kv)
    if not generate:
        return reading
    params = SamplingParams(max_tokens=generate, temperature=0.0, stop="\n")
    given = _run(engine, lane, prompt, params, context, None).outputs[0]
    return Reading(reading.answer, reading.logprobs, reading.kv, given.text, tuple(given.token_ids))


def forget(engine: Engine) -> None:
    """Drops the contexts that were kept for other methods: the next sample has another one."""
    for index in engine.memory.prefixes:
        index.clear()


def _run(
    engine: Engine, lane: int, ids: list[int], params: SamplingParams, context: int, tap: LogitsTap | None
) -> RequestOutput:
    request = engine.add_request(ids, params, lane=lane, context=context, tap=tap)
    try:
        while True:
            for output in engine.step():
                if output.finished:
                    if output.outputs[0].finish_reason == "error":
                        raise ModelError(str(output.outputs[0].stop_reason))
                    return output
    finally:
        engine.abort(request)
