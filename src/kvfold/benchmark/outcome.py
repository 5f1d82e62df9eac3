"""What happened to one request."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any


@dataclass
class Outcome:
    """One request, filled in while it runs, so that an interrupted one keeps what it measured.

    All times are seconds on the clock of the run. scheduled: when it should have been sent; ready: when the
    concurrency limit let it go (0 if it did not wait for that); sent: when it was given to the connection; ended:
    its last token, or its failure. arrivals: one entry for each chunk that carried text. wanted_*: tokens that
    were asked for. tokens are the server's own count where it gives one (`counted`), else the chunks. error:
    None, or the kind of failure.
    """

    index: int
    wanted_input: int
    wanted_output: int
    scheduled: float
    ready: float = 0.0
    sent: float | None = None
    ended: float | None = None
    arrivals: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int = 0
    counted: bool = False
    kv: Mapping[str, Any] | None = None
    error: str | None = None
    detail: str | None = None

    @property
    def succeeded(self) -> bool:
        """Whether the whole answer came."""
        return self.error is None and self.ended is not None

    @property
    def ttft(self) -> float | None:
        """Time to first token, from the scheduled time: waiting for a late generator counts as waiting."""
        first = self.first
        return None if first is None else first - self.scheduled

    @property
    def first(self) -> float | None:
        """When the first text came; the end, if the answer ended well without any text."""
        return self.arrivals[0] if self.arrivals else self.ended if self.succeeded else None

    @property
    def e2e(self) -> float | None:
        """Time from the scheduled moment to the last token of a whole answer."""
        return self.ended - self.scheduled if self.succeeded and self.ended is not None else None

    @property
    def delay(self) -> float:
        """Scheduled to sent: what latencies from the scheduled time have more than those from sending."""
        return 0.0 if self.sent is None else self.sent - self.scheduled

    @property
    def lag(self) -> float:
        """How late the generator itself was: the wait for a free place is the load's, not the generator's."""
        return 0.0 if self.sent is None else self.sent - max(self.ready, self.scheduled)

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first, of a whole answer of at least two tokens."""
        first = self.first
        if not self.succeeded or self.ended is None or first is None or self.output_tokens < 2:
            return None
        return (self.ended - first) / (self.output_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Times between chunks with text (inter-token latencies where a chunk is one token)."""
        return [later - earlier for earlier, later in pairwise(self.arrivals)]

    def fail(self, kind: str, detail: str) -> None:
        """Record a failure; the first one is the cause."""
        if self.error is None:
            self.error, self.detail = kind, detail[:500]
