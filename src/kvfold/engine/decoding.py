"""Steps that only decode, one token per sequence, as one call of the compiled kernels."""

from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor

from kvfold.attention.base import Plan, SequenceStep
from kvfold.attention.cpu.sealed import CpuSealedPlan
from kvfold.model.decoder import Decoder
from kvfold.model.heads import views
from kvfold.model.linear import Projections
from kvfold.model.packed import PackedLinear
from kvfold.model.packed_heads import MOST_DIM, heads_call
from kvfold.model.rope import Rotation
from kvfold.native.program import Kind, Program

KEPT = 32  # programs, each for its own numbers of sequences per lane
Steps = Seq[SequenceStep[Any]]


class DecodeProgram:
    """A forward pass over `count` tokens of each part: (projections, plan, count). Buffers and calls are made once."""

    def __init__(self, decoder: Decoder, parts: Seq[tuple[Seq[Projections], CpuSealedPlan, int]]) -> None:
        spec, self._decoder = decoder.spec, decoder
        self._plans = [plan for _, plan, _ in parts]
        tokens, dim = sum(count for *_, count in parts), spec.head_dim

        def buffer(*shape: int, dtype: torch.dtype = decoder.dtype) -> Tensor:
            return torch.empty(tokens, *shape, dtype=dtype)

        self._x = buffer(spec.hidden)
        qkv = buffer(spec.heads + 2 * spec.kv_heads, dim)
        attended, lse = buffer(spec.heads, dim), buffer(spec.heads, dtype=torch.float32)
        inner = buffer(_packed(decoder.weights.layers[0].mlp.up).rows)
        self._angles = [Rotation(*(buffer(1, dim, dtype=torch.float32) for _ in range(2))) for _ in decoder.rope_kinds]
        self._buffers = qkv, attended, lse, inner  # which the calls only point to
        calls: list[tuple[Kind, Any]] = []
        for index, layer in enumerate(decoder.weights.layers):
            kind = decoder.rope_kind_of_layer[index]
            first = 0
            for projections, plan, count in parts:
                own, rows = projections[index], slice(first, first + count)
                by = None if kind is None else self._angles[kind].take(rows)
                x, found = self._x[rows], attended[rows]
                calls.append((Kind.LINEAR, _packed(own.qkv).call(x, qkv[rows], layer.attention_norm)))
                calls.append((Kind.HEADS, heads_call(qkv[rows], spec.heads, own, layer.head_norm, by)))
                calls.append((Kind.ATTENTION, plan.call(index, *views(qkv[rows], spec.heads), found, lse[rows])))
                calls.append((Kind.LINEAR, _packed(own.out).call(found.flatten(1), x, onto=x)))
                first += count
            mlp = layer.mlp
            calls.append((Kind.LINEAR, _packed(mlp.up).call(self._x, inner, layer.mlp_norm)))
            calls.append((Kind.LINEAR, _packed(mlp.down).call(inner, self._x, mlp.gate, self._x)))
        self._program = Program(calls)

    def run(self, token_ids: Tensor, positions: Tensor, steps: Seq[Steps]) -> Tensor:
        """Hidden states after the final norm [T, D], as `Decoder.forward` gives them. steps: of each part."""
        self._x.copy_(self._decoder.embed(token_ids, positions))
        for held, now in zip(self._angles, self._decoder.rotations(positions), strict=True):
            held.cos.copy_(now.cos)
            held.sin.copy_(now.sin)
        for plan, own in zip(self._plans, steps, strict=True):
            plan.refill(own)
        self._program.run()
        return self._decoder.weights.final_norm(self._x)


class DecodePrograms:
    """The programs of one decoder, the least recently used being dropped."""

    def __init__(self, decoder: Decoder) -> None:
        layers = decoder.weights.layers
        self._decoder = decoder
        self._possible = (
            isinstance(decoder.weights.head, PackedLinear)
            and decoder.spec.head_dim <= MOST_DIM
            and all(each.post_attention_norm is None and each.post_mlp_norm is None for each in layers)
        )
        self._programs: OrderedDict[tuple[tuple[int, int], ...], DecodeProgram] = OrderedDict()

    def run(
        self, lanes: Seq[tuple[int, Seq[Projections], Steps, Callable[[], Plan]]], token_ids: Tensor, positions: Tensor
    ) -> Tensor | None:
        """lanes: (number, projections, steps, a function that plans them). None where this cannot be one call."""
        if not self._possible:
            return None
        key = tuple((number, len(steps)) for number, _, steps, _ in lanes)
        if key not in self._programs:
            plans = [plan() for *_, plan in lanes]
            sealed = [plan for plan in plans if isinstance(plan, CpuSealedPlan)]
            if len(sealed) < len(plans):
                return None
            parts = [(own, plan, len(steps)) for (_, own, steps, _), plan in zip(lanes, sealed, strict=True)]
            self._programs[key] = DecodeProgram(self._decoder, parts)
            if len(self._programs) > KEPT:
                self._programs.popitem(last=False)
        self._programs.move_to_end(key)
        return self._programs[key].run(token_ids, positions, [steps for _, _, steps, _ in lanes])


def _packed(linear: Any) -> PackedLinear:
    assert isinstance(linear, PackedLinear)
    return linear
