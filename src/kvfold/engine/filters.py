"""Which tokens may be drawn: min-p, top-k and top-p on rows of logits, and the draw itself.

Every function treats each row by itself and breaks ties towards the lower token id, so that a row's result
does not depend on its neighbours. Tokens that are filtered out get the logit -inf.
"""

import torch

_TOP_P_HEAD = 1024
"""top-p rarely keeps more tokens than this; only when it does is the whole row sorted."""


def keep_min_p(logits: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Keep tokens at least `min_p` times as likely as the row's most likely one.

    Args:
        logits: [N, V] float32.
        min_p: [N], in [0, 1]; 0 keeps all.
    """
    threshold = logits.amax(dim=-1) + min_p.log().to(logits.dtype)
    return logits.masked_fill(logits < threshold[:, None], -torch.inf)


def keep_top_k(logits: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """Keep the `top_k` most likely tokens of each row, exactly that many.

    Args:
        logits: [N, V] float32.
        top_k: [N] integers of at least 1.
    """
    count = top_k.clamp(max=logits.shape[-1])
    head = logits.topk(int(count.max()), dim=-1).values
    return _keep_first(logits, head, count)


def keep_top_p(logits: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Keep the fewest most likely tokens whose probability sums to at least `top_p`; at least one.

    Args:
        logits: [N, V] float32.
        top_p: [N] float64 in (0, 1].
    """
    vocab_size = logits.shape[-1]
    width = min(_TOP_P_HEAD, vocab_size)
    peak = logits.amax(dim=-1, keepdim=True)
    wanted = top_p[:, None] * (logits - peak).exp().sum(dim=-1, keepdim=True, dtype=torch.float64)
    head = logits.topk(width, dim=-1).values
    count = _tokens_needed(head, peak, wanted)
    result = _keep_first(logits, head, count.clamp(max=width))
    flat = (count > width).nonzero()[:, 0]
    if len(flat) and width < vocab_size:
        head = logits[flat].sort(dim=-1, descending=True).values
        count = _tokens_needed(head, peak[flat], wanted[flat])
        # Rounding can leave the whole row's mass just under top_p: then everything is kept.
        result[flat] = _keep_first(logits[flat], head, count.clamp(max=vocab_size))
    return result


def draw(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draw one token per row from softmax(logits) by inverting the distribution function at `uniforms`.

    The tokens are laid out in order of their ids; the sum runs in float64, so that rare tokens late in a
    large vocabulary keep their shares.

    Args:
        logits: [N, V] float32 with at least one finite value per row.
        uniforms: [N] float64 in [0, 1).

    Returns:
        [N] int64 token ids, each of positive probability.
    """
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    target = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def _tokens_needed(head: torch.Tensor, peak: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """How many tokens of the sorted `head` reach the mass `wanted`; one more than all where none do."""
    mass = (head - peak).exp().cumsum(dim=-1, dtype=torch.float64)
    return (mass < wanted).sum(dim=-1) + 1


def _keep_first(logits: torch.Tensor, head: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Keep the first `count` tokens of each row in descending order; `head` is the row's sorted beginning."""
    last = head.gather(1, count[:, None] - 1)
    keep = logits >= last
    excess = keep.sum(dim=-1, keepdim=True) - count[:, None]
    if bool(excess.any()):  # ties with the last one: the higher ids go
        tied = logits == last
        keep &= ~tied | (tied.cumsum(dim=-1) <= tied.sum(dim=-1, keepdim=True) - excess)
    return logits.masked_fill(~keep, -torch.inf)
