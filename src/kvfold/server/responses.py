"""Answers in OpenAI's shape, built from the engine's updates."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from kvfold.engine.outputs import FinishReason, Logprob
from kvfold.server.messages import Piece, Update
from kvfold.server.text import Text


@dataclass
class Usage:
    """Tokens and KV bytes of an answer; grows with its updates."""

    method: str
    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0
    kv_bytes: int = 0
    dense_bytes: int = 0

    def add(self, update: Update) -> None:
        self.completion_tokens += sum(len(piece.token_ids) for piece in update.pieces)
        self.cached_tokens += update.cached_prompt_tokens
        if update.kv is not None:
            self.kv_bytes += update.kv.bytes
            self.dense_bytes += update.kv.dense_bytes

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "kv": {
                "method": self.method,
                "bytes": self.kv_bytes,
                "dense_bytes": self.dense_bytes,
                "compression": self.dense_bytes / self.kv_bytes if self.kv_bytes else 1.0,
            },
        }


@dataclass
class Choice:
    """One completion as its pieces come in."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs or []
        self.finish_reason = piece.finish_reason or self.finish_reason


def chat_logprobs(
    text: Text, token_ids: list[int], entries: list[dict[int, Logprob]] | None, top: int
) -> dict[str, Any] | None:
    """Log-probabilities in the shape of chat completions, with the `top` most likely tokens, best first."""
    if entries is None:
        return None

    def shown(token_id: int, entry: dict[int, Logprob]) -> dict[str, Any]:
        token, its_bytes = text.token(token_id)
        return {"token": token, "logprob": entry[token_id].logprob, "bytes": its_bytes}

    content = [
        {**shown(token_id, entry), "top_logprobs": [shown(other, entry) for other in _best(entry)[:top]]}
        for token_id, entry in zip(token_ids, entries, strict=True)
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    text: Text, token_ids: list[int], entries: Sequence[dict[int, Logprob] | None], offset: int = 0
) -> dict[str, Any]:
    """Log-probabilities in the shape of plain completions. The first token of a prompt has none.

    offset: of the first token in the text, in characters.
    """
    tokens = [text.token(token_id)[0] for token_id in token_ids]
    known = list(zip(token_ids, entries, strict=True))
    return {
        "tokens": tokens,
        "token_logprobs": [None if e is None else e[t].logprob for t, e in known],
        "top_logprobs": [None if e is None else _by_text(text, e) for _, e in known],
        "text_offset": list(accumulate(map(len, tokens[:-1]), initial=offset)) if tokens else [],
    }


def _by_text(text: Text, entry: dict[int, Logprob]) -> dict[str, float]:
    """By the tokens' texts; of several that show the same, such as halves of characters, the likeliest counts."""
    return {text.token(token_id)[0]: entry[token_id].logprob for token_id in reversed(_best(entry))}


def _best(entry: dict[int, Logprob]) -> list[int]:
    """The tokens of an entry, the most likely one first."""
    return sorted(entry, key=lambda token_id: -entry[token_id].logprob)
