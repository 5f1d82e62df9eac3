"""What a request gives back, in vLLM's shape, with the KV bytes it held."""

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error", "handover"]
"""`stop`: end of sequence, stop id or string, complete grammar; `length`: max_tokens or model limit; `abort`:
cancelled; `error`: no token could be chosen, `stop_reason` says why; `handover`: it goes on in another engine."""


@dataclass(frozen=True)
class Logprob:
    """One token's natural-log probability under the model's raw distribution (no penalty, no temperature).

    `rank` is 1 for the most likely token.
    """

    logprob: float
    rank: int | None = None


@dataclass(frozen=True)
class KVUsage:
    """The KV cache that a request held when it ended, everything counted.

    Attributes:
        bytes: bytes of pages, tables, sinks and 16-bit windows.
        dense_bytes: bytes that a dense 16-bit cache of as many tokens takes.
        tokens: tokens held.
        elements: numbers those tokens stand for: tokens x layers x KV heads x head_dim x 2.
    """

    bytes: int = 0
    dense_bytes: int = 0
    tokens: int = 0
    elements: int = 0

    @classmethod
    def of(cls, held: int, tokens: int, kv_elements: int) -> "KVUsage":
        """kv_elements: of one token, as in `ModelSpec`."""
        elements = tokens * kv_elements
        return cls(held, 2 * elements, tokens, elements)

    @property
    def compression(self) -> float:
        """`dense_bytes / bytes`; 1.0 where nothing is held, so that it is always finite."""
        return self.dense_bytes / self.bytes if self.bytes else 1.0

    @property
    def bits_per_element(self) -> float:
        """Bits held per number of the cache, metadata and windows included; 0.0 where nothing is held."""
        return 8 * self.bytes / self.elements if self.elements else 0.0


@dataclass
class RequestMetrics:
    """When things happened to a request, in seconds of one monotonic clock, and what it cost or saved.

    `cached_prompt_tokens` counts prompt tokens whose KV came from the prefix index.
    """

    arrival_time: float = 0.0
    first_token_time: float | None = None
    finished_time: float | None = None
    cached_prompt_tokens: int = 0
    preemptions: int = 0

    @property
    def ttft(self) -> float | None:
        """Time to first token in seconds, queueing included; None before the first token."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def latency(self) -> float | None:
        """Seconds from arrival to the end; None while running."""
        return None if self.finished_time is None else self.finished_time - self.arrival_time


@dataclass
class CompletionOutput:
    """One of a request's `n` completions, as far as it has been generated.

    `logprobs` has one mapping from token id per generated token: the sampled token first, then the most
    likely ones. `stop_reason` is the stop string or stop token id that ended it, None for end of sequence; after an
    `error` the sentence that says what went wrong.
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        """True once `finish_reason` is set."""
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """A request and all its completions. `prompt_logprobs[0]` is None: nothing precedes the first token. `kv` is
    filled in when the request ends."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    kv: KVUsage = field(default_factory=KVUsage)
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
