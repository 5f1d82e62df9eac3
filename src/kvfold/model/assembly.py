"""From the tensors of a checkpoint to the fused weights of a decoder."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvfold.errors import ModelError
from kvfold.methods.base import AttentionWeights
from kvfold.model.blocks import DecoderWeights, LayerWeights, Mlp
from kvfold.model.checkpoint import Checkpoint
from kvfold.model.elementwise import Gate, HeadNorm, Norm
from kvfold.model.linear import TorchLinear
from kvfold.model.spec import ModelSpec
from kvfold.model.weight_names import WEIGHT_NAMES, WeightNames


def assemble(checkpoint: Checkpoint, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> DecoderWeights:
    """Read, fuse and convert all weights; raises ModelError for missing, misshapen or unknown ones."""
    return _Assembler(checkpoint, spec, dtype, device).decoder()


class _Assembler:
    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._spec = spec
        self._dtype = dtype
        self._device = device
        self._names: WeightNames = WEIGHT_NAMES[spec.family]
        self._prefix = self._find_prefix()

    def decoder(self) -> DecoderWeights:
        spec, names = self._spec, self._names
        embedding = self._matrix(self._prefix + names.embedding, (spec.vocab, spec.hidden))
        weights = DecoderWeights(
            embedding=embedding,
            positions=self._positions(),
            attention=tuple(self._attention(self._at(index)) for index in range(spec.n_layers)),
            layers=tuple(self._layer(self._at(index)) for index in range(spec.n_layers)),
            final_norm=self._norm(self._prefix + names.final_norm),
            head=TorchLinear(embedding if spec.tie_embeddings else self._head()),
        )
        # With an empty prefix the head is a neighbour of the layers, so only the layers are checked.
        self._checkpoint.check_all_read(f"{self._prefix}{names.layers}.")
        return weights

    def _find_prefix(self) -> str:
        for prefix in self._names.prefixes:
            if f"{prefix}{self._names.embedding}.weight" in self._checkpoint:
                return prefix
        raise ModelError(
            f"the weights in {self._checkpoint.directory} do not name their tensors as {self._spec.family} "
            "models do: save them with save_pretrained of transformers"
        )

    def _head(self) -> Tensor:
        heads = self._names.heads
        found = next((head for head in heads if f"{head}.weight" in self._checkpoint), heads[0])
        return self._matrix(found, (self._spec.vocab, self._spec.hidden))

    def _positions(self) -> Tensor | None:
        if self._names.positions is None:
            return None
        offset = self._names.position_offset
        rows = self._spec.max_positions + offset
        return self._matrix(self._prefix + self._names.positions, (rows, self._spec.hidden))[offset:]

    def _at(self, index: int) -> str:
        return f"{self._prefix}{self._names.layers}.{index}."

    def _layer(self, at: str) -> LayerWeights:
        names = self._names
        return LayerWeights(
            attention_norm=self._norm(at + names.attention_norm),
            mlp_norm=self._norm(at + names.mlp_norm),
            mlp=self._mlp(at),
            head_norm=self._head_norm(at) if self._spec.qk_norm else None,
            post_attention_norm=self._post_norm(at, names.post_attention_norm),
            post_mlp_norm=self._post_norm(at, names.post_mlp_norm),
        )

    def _attention(self, at: str) -> AttentionWeights:
        spec, names = self._spec, self._names
        q_rows, kv_rows = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        if names.qkv is not None:
            parts = [(at + names.qkv, q_rows + 2 * kv_rows)]
        else:
            parts = [(f"{at}{names.q}", q_rows), (f"{at}{names.k}", kv_rows), (f"{at}{names.v}", kv_rows)]
        qkv, qkv_bias = self._linear(parts, spec.hidden, spec.qkv_bias)
        out, out_bias = self._linear([(at + names.out, spec.hidden)], q_rows, spec.out_bias)
        return AttentionWeights(qkv=qkv, qkv_bias=qkv_bias, out=out, out_bias=out_bias)

    def _mlp(self, at: str) -> Mlp:
        spec, names = self._spec, self._names
        inputs = [names.gate, names.up] if spec.gated_mlp else [names.up]
        parts = [(f"{at}{name}", spec.intermediate) for name in inputs]
        up = self._linear(parts, spec.hidden, spec.mlp_bias)
        down = self._linear([(at + names.down, spec.hidden)], spec.intermediate, spec.mlp_bias)
        return Mlp(TorchLinear(*up), Gate(spec.activation, spec.gated_mlp), TorchLinear(*down))

    def _norm(self, name: str) -> Norm:
        norm = self._spec.norm
        shape = (self._spec.hidden,)
        bias = self._copy(f"{name}.bias", shape) if norm.kind == "layer" else None
        return Norm(norm.kind, self._gain(f"{name}.weight", shape), bias, norm.eps)

    def _post_norm(self, at: str, name: str | None) -> Norm | None:
        return self._norm(at + name) if self._spec.post_norms and name is not None else None

    def _head_norm(self, at: str) -> HeadNorm:
        spec, names = self._spec, self._names
        shape = (spec.head_dim,)
        q = self._gain(f"{at}{names.q_norm}.weight", shape).expand(spec.heads, -1)
        k = self._gain(f"{at}{names.k_norm}.weight", shape).expand(spec.kv_heads, -1)
        return HeadNorm(torch.cat((q, k)), spec.norm.eps)

    def _gain(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if not self._spec.norm.unit_offset:
            return self._copy(name, shape)
        return 1.0 + self._checkpoint.read(name, shape).to(self._device, torch.float32)

    def _matrix(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._copy(f"{name}.weight", shape)

    def _copy(self, name: str, shape: tuple[int, ...]) -> Tensor:
        # A copy even where dtype and device agree: weights must not depend on the mapped file any more.
        return self._checkpoint.read(name, shape).to(self._device, self._dtype, copy=True)

    def _linear(self, parts: Sequence[tuple[str, int]], inputs: int, bias: bool) -> tuple[Tensor, Tensor | None]:
        """Stack the [rows, inputs] matrices (and biases) of parts (name, rows) into one."""
        rows = sum(count for _, count in parts)
        weight = torch.empty(rows, inputs, dtype=self._dtype, device=self._device)
        biases = torch.empty(rows, dtype=self._dtype, device=self._device) if bias else None
        end = 0
        for name, count in parts:
            start, end = end, end + count
            shape = (inputs, count) if self._names.transposed else (count, inputs)
            stored = self._checkpoint.read(f"{name}.weight", shape)
            weight[start:end].copy_(stored.T if self._names.transposed else stored)
            if biases is not None:
                biases[start:end].copy_(self._checkpoint.read(f"{name}.bias", (count,)))
        return weight, biases
