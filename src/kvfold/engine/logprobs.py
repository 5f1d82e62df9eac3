"""Log-probabilities of given tokens, with their ranks and the most likely alternatives."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvfold.engine.outputs import Logprob

_CHUNK_ELEMENTS = 1 << 23
"""Logits converted to float32 at a time (32 MiB): a long prompt needs no second copy of its logits."""


@dataclass(frozen=True)
class TokenLogprobs:
    """For each of T rows of logits: the given token, and the `top` most likely ones, best first.

    Attributes:
        token_ids: [T] int64, the given tokens.
        logprob: [T] float32, natural logarithm.
        rank: [T] int64, 1 + the number of tokens that are strictly more likely.
        top_ids: [T, top] int64.
        top_logprob: [T, top] float32, descending.
    """

    token_ids: torch.Tensor
    logprob: torch.Tensor
    rank: torch.Tensor
    top_ids: torch.Tensor
    top_logprob: torch.Tensor

    def as_dicts(self, tops: Sequence[int] | None = None) -> list[dict[int, Logprob]]:
        """One mapping per row: the given token first, then `tops[row]` alternatives (all by default)."""
        result = []
        given = zip(self.token_ids.tolist(), self.logprob.tolist(), self.rank.tolist(), strict=True)
        best = zip(self.top_ids.tolist(), self.top_logprob.tolist(), strict=True)
        for row, ((token_id, logprob, rank), (ids, values)) in enumerate(zip(given, best, strict=True)):
            entry = {token_id: Logprob(logprob, rank)}
            for place, other in enumerate(ids[: None if tops is None else tops[row]]):
                value = values[place]
                entry.setdefault(other, Logprob(value, 1 + values.index(value)))  # equal values share a rank
            result.append(entry)
        return result


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, top: int = 0) -> TokenLogprobs:
    """Log-probability of `token_ids[t]` under `softmax(logits[t])` for every row t.

    Args:
        logits: [T, V], any floating dtype; computed in float32, some rows at a time.
        token_ids: [T] int64. For prompt logprobs these are the *next* tokens: `prompt[1:]` for `logits[:-1]`.
        top: number of most likely tokens to add per row, cut to V.
    """
    count, vocab_size = logits.shape
    top = min(top, vocab_size)
    rows = max(1, _CHUNK_ELEMENTS // vocab_size)
    parts = [
        _chunk(logits[first : first + rows].float(), token_ids[first : first + rows], top)
        for first in range(0, max(count, 1), rows)
    ]
    logprob, rank, top_ids, top_logprob = (torch.cat(part) for part in zip(*parts, strict=True))
    return TokenLogprobs(token_ids, logprob, rank, top_ids, top_logprob)


def _chunk(
    logits: torch.Tensor, token_ids: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    chosen = logits.gather(1, token_ids[:, None])
    log_total = logits.logsumexp(dim=-1, keepdim=True)
    rank = 1 + (logits > chosen).sum(dim=-1)
    best = logits.topk(top, dim=-1)
    return (chosen - log_total)[:, 0], rank, best.indices, best.values - log_total
