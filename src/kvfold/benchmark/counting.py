"""How many tokens a text has: asked of the server, or estimated from its characters."""

from dataclasses import dataclass
from typing import Any, Protocol

import httpx2

from kvfold.benchmark.errors import BenchmarkError

TOKENIZE_PATHS = ("/v1/tokenize", "/tokenize")
"""kvfold's route and vLLM's; both take and give the same fields."""


class TokenCounter(Protocol):
    """Counts the tokens of a text without special ones. exact: whether it asks a tokenizer."""

    @property
    def exact(self) -> bool: ...

    async def count(self, text: str) -> int:
        """Tokens of `text`."""
        ...


@dataclass(frozen=True)
class EstimatedCounter:
    """Tokens from characters, for servers without a tokenizer route."""

    tokens_per_character: float
    exact: bool = False

    async def count(self, text: str) -> int:
        """See `TokenCounter.count`; at least 1."""
        return max(1, round(len(text) * self.tokens_per_character))


@dataclass(frozen=True)
class ServerCounter:
    """Asks the server. special: tokens that its tokenizer adds to every text. context: the model's, if told."""

    http: httpx2.AsyncClient
    path: str
    model: str
    special: int
    context: int | None
    exact: bool = True

    async def count(self, text: str) -> int:
        """See `TokenCounter.count`. Raises BenchmarkError when the server stops answering."""
        answer = await _tokenize(self.http, self.path, self.model, text)
        if answer is None:
            raise BenchmarkError(f"the server stopped answering {self.path} while prompts were made; see its log")
        return int(answer["count"]) - self.special


async def find_counter(http: httpx2.AsyncClient, model: str) -> ServerCounter | None:
    """The server's own tokenizer, or None if it has no such route."""
    for path in TOKENIZE_PATHS:
        one = await _tokenize(http, path, model, "a")
        two = await _tokenize(http, path, model, "a a")
        if one is not None and two is not None:
            context = one.get("max_model_len")
            # "a" and " a" are one token each in every tokenizer that splits at words, so what is left is special.
            special = max(0, 2 * one["count"] - two["count"])
            return ServerCounter(http, path, model, special, context if type(context) is int else None)
    return None


async def _tokenize(http: httpx2.AsyncClient, path: str, model: str, text: str) -> dict[str, Any] | None:
    try:
        response = await http.post(path, json={"model": model, "prompt": text})
        answer = response.json() if response.status_code == 200 else None
    except (httpx2.TransportError, ValueError):
        return None
    return answer if isinstance(answer, dict) and type(answer.get("count")) is int else None
