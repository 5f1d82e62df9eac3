"""From what clients send to what the engine takes."""

import uuid
from typing import Any

from kvfold.engine.params import SamplingParams
from kvfold.errors import ConfigError
from kvfold.server.http_errors import APIError
from kvfold.server.messages import Ready
from kvfold.server.protocol import ChatCompletionRequest, CompletionRequest, SamplingFields

_SAME_NAMES = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "min_tokens",
    "logit_bias",
)
COMPLETION_TOKENS = 16  # OpenAI's default for plain completions; chat has none


def new_id(prefix: str) -> str:
    """An id no other request has."""
    return f"{prefix}-{uuid.uuid4().hex}"


def chat_params(request: ChatCompletionRequest, ready: Ready) -> SamplingParams:
    """Sampling parameters of a chat completion. Raises APIError (400) where they contradict each other."""
    if request.top_logprobs is not None and not request.logprobs:
        raise APIError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return _params(request, ready, request.max_completion_tokens or request.max_tokens, logprobs)


def completion_params(request: CompletionRequest, ready: Ready) -> SamplingParams:
    """Sampling parameters of a plain completion. Raises APIError (400) where they contradict each other."""
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise APIError(400, "best_of other than n is not supported; leave it out", param="best_of")
    prompt_logprobs = request.logprobs if request.echo else None
    params = _params(request, ready, request.max_tokens or COMPLETION_TOKENS, request.logprobs, prompt_logprobs)
    return params


def _params(
    request: SamplingFields,
    ready: Ready,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    if request.stream_options is not None and not request.stream:
        raise APIError(400, "stream_options needs stream=true", param="stream_options")
    given: dict[str, Any] = {name: value for name in _SAME_NAMES if (value := getattr(request, name)) is not None}
    try:
        params = SamplingParams(**given, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
        params.check_vocabulary(ready.vocab)
    except ConfigError as error:
        raise APIError(400, str(error)) from error
    return params
