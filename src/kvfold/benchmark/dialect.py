"""Which optional fields a server takes in a request."""

from dataclasses import dataclass
from typing import Any

from kvfold.benchmark.options import Endpoint


@dataclass(frozen=True)
class Dialect:
    """What bodies may say.

    exact: `ignore_eos` and `min_tokens` (vLLM, SGLang, kvfold), which make answers exactly as long as asked.
    usage: `stream_options.include_usage`. modern: `max_completion_tokens` instead of `max_tokens`, and no
    temperature, as OpenAI's reasoning models want it.
    """

    exact: bool
    usage: bool
    modern: bool = False

    def body(self, endpoint: Endpoint, model: str, kv: str | None, prompt: str, output_tokens: int) -> dict[str, Any]:
        """The JSON body of a streaming request for `output_tokens` tokens."""
        body: dict[str, Any] = {"model": model, "stream": True}
        if endpoint == "chat":
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        body["max_completion_tokens" if self.modern else "max_tokens"] = output_tokens
        if not self.modern:
            body["temperature"] = 0
        if self.exact:
            body |= {"ignore_eos": True, "min_tokens": output_tokens}
        if self.usage:
            body["stream_options"] = {"include_usage": True}
        if kv is not None:
            body["kv"] = kv
        return body


def dialects(exact: bool) -> list[Dialect]:
    """From the most that a server may take to the least, in the order to try; without `exact` if it is not wanted."""
    plain = [Dialect(False, True), Dialect(False, True, modern=True), Dialect(False, False)]
    return [Dialect(True, True), *plain] if exact else plain
