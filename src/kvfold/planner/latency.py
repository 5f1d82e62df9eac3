"""What a step of the engine takes, as a function of what it computes (DistServe, arXiv 2401.09670, section 3 and
appendix A, with bytes in place of tokens so that the compression method counts).

A step may hold prompt tokens, decoding sequences or both. Attention of a chunk of n tokens behind p others looks at
about p n + n^2 / 2 pairs; twice that, (p + n)^2 - p^2, is the `squares` of the chunk: they add up to l^2 over a prompt
of l tokens however it is cut.
"""

from dataclasses import dataclass


def chunk_squares(before: int, count: int) -> int:
    """The quadratic term of `count` prompt tokens behind `before` others that are in the cache."""
    return (before + count) ** 2 - before**2


@dataclass(frozen=True)
class StepWork:
    """What a step computes.

    tokens, squares: of prompts, summed over its sequences; kv_bytes: pages that its decoding sequences read; batch:
    how many these are.
    """

    tokens: int = 0
    squares: int = 0
    kv_bytes: int = 0
    batch: int = 0


@dataclass(frozen=True)
class PrefillCost:
    """Seconds: fixed + per_token * tokens + per_square * squares. Encoding into pages is in it."""

    fixed: float
    per_token: float
    per_square: float

    def seconds(self, tokens: int, squares: int) -> float:
        return self.fixed + self.per_token * tokens + self.per_square * squares


@dataclass(frozen=True)
class DecodeCost:
    """Seconds: fixed + per_byte * kv_bytes + per_sequence * batch."""

    fixed: float
    per_byte: float
    per_sequence: float

    def seconds(self, kv_bytes: int, batch: int) -> float:
        return self.fixed + self.per_byte * kv_bytes + self.per_sequence * batch


@dataclass(frozen=True)
class TransferCost:
    """Seconds that a handover takes beside the link: overhead + size / bytes_per_second (taking pages out of one pool
    and putting them into another)."""

    overhead: float
    bytes_per_second: float

    def seconds(self, size: int) -> float:
        return self.overhead + size / self.bytes_per_second


@dataclass(frozen=True)
class LatencyModel:
    """Seconds of a step.

    decode serves batches up to `knee` sequences and decode_above larger ones: below it the weights' bytes decide,
    above it the arithmetic. decode_above is None where one cost serves all.
    """

    prefill: PrefillCost
    decode: DecodeCost
    decode_above: DecodeCost | None = None
    knee: int = 0

    def decoding(self, batch: int) -> DecodeCost:
        return self.decode if self.decode_above is None or batch <= self.knee else self.decode_above

    def seconds(self, work: StepWork) -> float:
        """Seconds of a step. One that does both reads the weights once: it pays the larger of the fixed costs, and
        the rest of both."""
        if not work.batch:
            return self.prefill.seconds(work.tokens, work.squares)
        decode = self.decoding(work.batch)
        alone = decode.seconds(work.kv_bytes, work.batch)
        if not work.tokens:
            return alone
        both = self.prefill.seconds(work.tokens, work.squares) + alone
        return both - min(self.prefill.fixed, decode.fixed)
