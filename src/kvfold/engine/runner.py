"""One forward pass over what the scheduler chose: tokens in, logits of the sequences that caught up out."""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from kvfold.attention.base import AttentionBackend, Plan, SequenceStep
from kvfold.engine.decoding import DecodePrograms
from kvfold.engine.handover import Outgoing
from kvfold.engine.lane import MethodLane
from kvfold.engine.logprobs import TokenLogprobs, token_logprobs
from kvfold.engine.memory import KVMemory
from kvfold.engine.scheduler import Scheduled
from kvfold.engine.sequence import Sequence
from kvfold.model.decoder import Decoder, Lane


@dataclass(frozen=True)
class StepResult:
    """Sequences whose last token was computed, their next-token logits float32 [N, V], and prompt log-probabilities
    of those that asked: (sequence, position of the first token they are for, values)."""

    ready: list[Sequence]
    logits: Tensor
    prompt_logprobs: list[tuple[Sequence, int, TokenLogprobs]]


@dataclass(frozen=True)
class _Part:
    """A lane's share of a step: which tokens of the batch, of which sequences."""

    number: int
    lane: MethodLane
    steps: list[SequenceStep[Any]]
    tokens: slice
    plan: Callable[[], Plan]  # made when it is first asked for
    outgoing: list[Outgoing]


class Runner:
    """Runs steps of a model over one KV memory; sequences of several lanes share a step's norms and MLPs."""

    def __init__(self, decoder: Decoder, lanes: Seq[MethodLane], memory: KVMemory, backend: AttentionBackend) -> None:
        self._decoder = decoder
        self._lanes = lanes
        self._memory = memory
        self._backend = backend
        self._programs = DecodePrograms(decoder)

    @torch.inference_mode()
    def run(self, scheduled: Seq[Scheduled], outgoing: Mapping[str, Outgoing] | None = None) -> StepResult:
        """Computes the scheduled tokens and advances their tables. outgoing: caches, by request id, that are being
        fetched as they become complete."""
        ordered = sorted(scheduled, key=lambda s: s.sequence.request.lane)
        token_ids: list[int] = []
        positions: list[Tensor] = []
        for item in ordered:
            start = item.sequence.computed
            token_ids += item.sequence.tokens_from(start, item.count)
            positions.append(torch.arange(start, start + item.count))
        hidden = self._forward(ordered, torch.tensor(token_ids), torch.cat(positions), outgoing or {})
        result = self._results(ordered, hidden)
        for item in ordered:
            tables = item.sequence.held
            tables.advance(self._memory.pool, tables.length + item.count)
        return result

    def _forward(
        self, ordered: Seq[Scheduled], token_ids: Tensor, positions: Tensor, outgoing: Mapping[str, Outgoing]
    ) -> Tensor:
        parts = self._parts(ordered, outgoing)
        if len(ordered) == len(token_ids):
            decoding = [(p.number, p.lane.weights, p.steps, p.plan) for p in parts]
            hidden = self._programs.run(decoding, token_ids, positions)
            if hidden is not None:
                return hidden
        return self._decoder.forward(token_ids, positions, [self._batch_lane(part) for part in parts])

    def _parts(self, ordered: Seq[Scheduled], outgoing: Mapping[str, Outgoing]) -> list["_Part"]:
        """The lanes that have something to do, in the order of the batch."""
        parts, first = [], 0
        scale = self._decoder.spec.attention_scale
        for number, lane in enumerate(self._lanes):
            steps: list[SequenceStep[Any]] = []
            leaving: list[Outgoing] = []
            count = 0
            for item in ordered:
                if item.sequence.request.lane == number:
                    if item.sequence.request.id in outgoing:
                        leaving.append(outgoing[item.sequence.request.id])
                    steps.append(SequenceStep[Any](item.sequence.held, count, item.count))
                    count += item.count
            if steps:
                plan = cache(partial(self._backend.plan, self._memory.pool, lane.layout, steps, scale))
                parts.append(_Part(number, lane, steps, slice(first, first + count), plan, leaving))
                first += count
        return parts

    def _batch_lane(self, part: "_Part") -> Lane:
        plan = part.plan()

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out, _ = plan.attend(layer, q, k, v)
            for leaving in part.outgoing:
                leaving.computed(layer + 1)
            return out

        return Lane(part.tokens, part.lane.weights, attend)

    def _results(self, ordered: Seq[Scheduled], hidden: Tensor) -> StepResult:
        ready, rows, first = [], [], 0
        prompt_logprobs = []
        for item in ordered:
            sequence, start = item.sequence, item.sequence.computed
            if start + item.count == len(sequence):
                ready.append(sequence)
                rows.append(first + item.count - 1)
            top = sequence.request.params.prompt_logprobs
            prompt = sequence.request.prompt_token_ids
            known = 1 if sequence.request.prompt_logprobs is None else len(sequence.request.prompt_logprobs)
            begin, end = max(start + 1, known), min(start + item.count + 1, len(prompt))
            if top is not None and begin < end:
                logits = self._decoder.logits(hidden[first + begin - start - 1 : first + end - start - 1])
                values = token_logprobs(logits, torch.tensor(prompt[begin:end]), top)
                prompt_logprobs.append((sequence, begin, values))
            tap = sequence.request.tap
            if tap is not None:
                begin, end = max(start, tap.start), min(start + item.count, len(prompt))
                if begin < end:
                    tap.receive(begin, self._decoder.logits(hidden[first + begin - start : first + end - start]))
            first += item.count
        return StepResult(ready, self._decoder.logits(hidden[rows]), prompt_logprobs)
