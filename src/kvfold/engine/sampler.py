"""From logits to tokens: each row by its own request's parameters, all rows at once.

The order of operations is vLLM's: logit bias, mask until `min_tokens`, grammar, penalties (repetition over prompt and
output; frequency and presence over the output), then either the most likely token (greedy), or temperature,
min-p, top-k, top-p and one draw. Log-probabilities are those of the untouched logits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvfold.engine.filters import draw, keep_min_p, keep_top_k, keep_top_p
from kvfold.engine.logprobs import TokenLogprobs, token_logprobs
from kvfold.engine.outputs import Logprob
from kvfold.engine.params import SamplingParams
from kvfold.engine.row_state import RowState

__all__ = ["RowState", "SampledTokens", "Sampler", "TokenLogprobs", "token_logprobs"]

_UNCHOOSABLE = (
    "The model gave logits that are not finite, or every token is masked: "
    'load the model with dtype="float32" or ease the grammar, logit_bias, min_tokens and stop_token_ids.'
)
_DRAW_ELEMENTS = 1 << 24
"""Logits drawn from at a time: bounds the float64 temporaries to a few times 128 MiB."""


@dataclass(frozen=True)
class SampledTokens:
    """One new token per row, None where none could be chosen: then `errors[row]` says why.

    `logprobs[row]` is None where the request did not ask for any.
    """

    token_ids: list[int | None]
    errors: list[str | None]
    logprobs: list[dict[int, Logprob] | None]


class Sampler:
    """Chooses the next token of each row. Stateless: everything about a sequence is in its `RowState`."""

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, rows: Sequence[RowState]) -> SampledTokens:
        """Choose one token per row.

        Args:
            logits: [N, V] float32, unchanged on return.
            rows: N states; their `output_token_ids` are read, not appended to.

        A row that no token can be chosen for (its logits are not finite, or its grammar allows none) does not
        concern the others.
        """
        if logits.shape[0] != len(rows):
            raise ValueError(f"{logits.shape[0]} rows of logits for {len(rows)} sequences")
        if not rows:
            return SampledTokens([], [], [])
        adjusted = _penalise(_constrain(_bias_and_mask(logits, rows), rows), rows)
        best, token_ids = adjusted.max(dim=-1)
        good = best.isfinite().tolist()
        drawn = [index for index, row in enumerate(rows) if good[index] and not row.params.greedy]
        step = max(1, _DRAW_ELEMENTS // logits.shape[1])
        for first in range(0, len(drawn), step):
            part = drawn[first : first + step]
            token_ids[part] = _draw_rows(adjusted[part], [rows[index] for index in part])
        return SampledTokens(
            [token if fine else None for token, fine in zip(token_ids.tolist(), good, strict=True)],
            [None if fine else _UNCHOOSABLE for fine in good],
            _sampled_logprobs(logits, token_ids, rows, good),
        )


def _bias_and_mask(logits: torch.Tensor, rows: Sequence[RowState]) -> torch.Tensor:
    """Add logit biases and mask what would end a sequence too early; a copy only where there is any."""
    edits: list[tuple[int, int, float]] = []
    for index, row in enumerate(rows):
        edits += [(index, token_id, bias) for token_id, bias in (row.params.logit_bias or {}).items()]
        if row.below_min_tokens and row.grammar is None:
            edits += [(index, token_id, -torch.inf) for token_id in row.stop_ids]
    if not edits:
        return logits
    at_row, at_token, amount = zip(*edits, strict=True)
    where = (torch.tensor(at_row, device=logits.device), torch.tensor(at_token, device=logits.device))
    amounts = torch.tensor(amount, dtype=logits.dtype, device=logits.device)
    return logits.index_put(where, amounts, accumulate=True)


def _constrain(logits: torch.Tensor, rows: Sequence[RowState]) -> torch.Tensor:
    """Mask what the grammars of those rows that have one do not allow; a copy only where there is one."""
    masks = [(index, mask) for index, row in enumerate(rows) if (mask := row.grammar_mask()) is not None]
    if not masks:
        return logits
    indices, bits = [index for index, _ in masks], torch.stack([mask for _, mask in masks]).to(logits.device)
    places = torch.arange(32, dtype=torch.int32, device=logits.device)
    allowed = ((bits[:, :, None] >> places) & 1).flatten(1)[:, : logits.shape[1]].bool()
    result = logits.clone()
    result[indices] = logits[indices].masked_fill(~allowed, -torch.inf)
    return result


def _penalise(logits: torch.Tensor, rows: Sequence[RowState]) -> torch.Tensor:
    """Apply the three penalties to the rows that have any; a copy only where there is one."""
    active = [index for index, row in enumerate(rows) if _penalised(row.params)]
    if not active:
        return logits
    vocab_size, device = logits.shape[1], logits.device
    part = logits[active]
    counts = torch.stack([rows[index].output_counts(vocab_size, device) for index in active])
    repetition = _column(logits, [rows[index].params.repetition_penalty for index in active])
    if bool((repetition != 1).any()):
        in_prompt = torch.stack([rows[index].prompt_seen(vocab_size, device) for index in active])
        repeated = torch.where(part > 0, part / repetition, part * repetition)
        part = torch.where(in_prompt | (counts > 0), repeated, part)
    frequency = _column(logits, [rows[index].params.frequency_penalty for index in active])
    presence = _column(logits, [rows[index].params.presence_penalty for index in active])
    if bool((frequency != 0).any() or (presence != 0).any()):
        part -= counts * frequency + (counts > 0) * presence
    result = logits.clone()
    result[active] = part
    return result


def _draw_rows(logits: torch.Tensor, rows: Sequence[RowState]) -> torch.Tensor:
    """Temperature, filters and draw for rows that are not greedy: [M, V] float32 to [M] int64."""
    logits = logits / _column(logits, [row.params.temperature for row in rows])
    _filter(logits, [row.params.min_p for row in rows], 0.0, keep_min_p)
    _filter(logits, [row.params.top_k for row in rows], 0, keep_top_k)
    _filter(logits, [row.params.top_p for row in rows], 1.0, keep_top_p)
    uniforms = torch.tensor([row.uniform() for row in rows], dtype=torch.float64, device=logits.device)
    return draw(logits, uniforms)


def _filter(
    logits: torch.Tensor,
    settings: Sequence[float],
    off: float,
    keep: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    """Filter in place those rows whose setting is not `off`."""
    active = [index for index, setting in enumerate(settings) if setting != off]
    if not active:
        return
    dtype = torch.int64 if isinstance(off, int) else torch.float64
    values = torch.tensor([settings[index] for index in active], dtype=dtype, device=logits.device)
    logits[active] = keep(logits[active], values)


def _sampled_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, rows: Sequence[RowState], good: Sequence[bool]
) -> list[dict[int, Logprob] | None]:
    result: list[dict[int, Logprob] | None] = [None] * len(rows)
    asked = [(i, row.params.logprobs) for i, row in enumerate(rows) if row.params.logprobs is not None and good[i]]
    if asked:
        indices, tops = [index for index, _ in asked], [top for _, top in asked]
        entries = token_logprobs(logits[indices], token_ids[indices], max(tops)).as_dicts(tops)
        for index, entry in zip(indices, entries, strict=True):
            result[index] = entry
    return result


def _penalised(params: SamplingParams) -> bool:
    return bool(params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1.0)


def _column(like: torch.Tensor, values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
