"""Linear layers whose weights are packed for the compiled kernels, with what comes before and after them fused."""

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import c_double, c_int64, c_void_p
from dataclasses import replace

import torch
from torch import Tensor

from kvfold.errors import ConfigError
from kvfold.model.blocks import DecoderWeights, LayerWeights, Mlp
from kvfold.model.elementwise import Gate, Norm
from kvfold.model.linear import Linear, Projections, TorchLinear
from kvfold.model.packed_heads import MOST_DIM
from kvfold.model.packing import pack
from kvfold.model.spec import Activation
from kvfold.native.library import find_kernels, library

_ACTIVATIONS: Mapping[Activation, int] = {"silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4}
_NORMS = {"rms": 1, "layer": 2}
HEAD_BITS = 8  # at least: four bits in the head alone raised the perplexity by 13 points of a hundred
_BITS: Mapping[str, int | None] = {"auto": None, "bfloat16": 16, "int8": 8, "int4": 4}


def weight_bits(name: str) -> int | None:
    """What `pack` takes for a user's word: `auto` (None: weights stay in their dtype), `bfloat16`, `int8` or `int4`.

    Raises ConfigError for another word.
    """
    if name not in _BITS:
        raise ConfigError(f"weights={name!r} is unknown; choose {', '.join(_BITS)}")
    return _BITS[name]


class LinearCall(ctypes.Structure):
    """`kvfold_linear` of linear.h."""

    _fields_ = (
        ("x", c_void_p),
        *((name, c_int64) for name in ("x_stride", "tokens", "rows", "inputs", "bits")),
        *((name, c_void_p) for name in ("codes", "scales", "bias", "onto")),
        ("onto_stride", c_int64),
        ("out", c_void_p),
        ("wide", c_int64),
        ("norm", c_int64),
        ("gain", c_void_p),
        ("shift", c_void_p),
        ("eps", c_double),
        ("activation", c_int64),
        ("gated", c_int64),
        ("kernels", c_void_p),
    )


class PackedLinear:
    """Implements `Linear` for inference, float32 or bfloat16 activations; norms are to be in float32.

    bits: 16 (bfloat16 weights), 8 or 4. With coded weights the input is rounded to eight bits per token and group of
    32 inputs. Raises KernelsUnavailable where the kernels were not built.
    """

    def __init__(self, linear: TorchLinear, bits: int, kernels: str | None = None) -> None:
        self._codes, self._scales = pack(linear.weight, bits)
        self._bias = None if linear.bias is None else linear.bias.float()
        rows, inputs = linear.weight.shape
        self._call = LinearCall(
            rows=rows,
            inputs=inputs,
            bits=bits,
            codes=self._codes.data_ptr(),
            scales=self._scales.data_ptr(),
            bias=None if self._bias is None else self._bias.data_ptr(),
            kernels=find_kernels(kernels),
        )

    def __call__(self, x: Tensor, before: Norm | Gate | None = None, onto: Tensor | None = None) -> Tensor:
        out = x.new_empty(x.shape[0], self.rows)
        if x.shape[0]:
            x = x if x.stride(1) == 1 else x.contiguous()
            onto = onto if onto is None or onto.stride(1) == 1 else onto.contiguous()
            library().kvfold_multiply(ctypes.byref(self.call(x, out, before, onto)))
        return out

    def call(self, x: Tensor, out: Tensor, before: Norm | Gate | None = None, onto: Tensor | None = None) -> LinearCall:
        """What the kernels are to compute; the tensors must outlive it. out: [T, rows], dense; it may be `onto`."""
        call = LinearCall.from_buffer_copy(self._call)
        call.x, call.x_stride, call.tokens = x.data_ptr(), x.stride(0), x.shape[0]
        call.out, call.wide = out.data_ptr(), x.dtype == torch.float32
        if isinstance(before, Norm):
            call.norm, call.gain, call.eps = _NORMS[before.kind], before.weight.data_ptr(), before.eps
            call.shift = None if before.bias is None else before.bias.data_ptr()
        elif before is not None:
            call.activation, call.gated = _ACTIVATIONS[before.activation], before.gated
        if onto is not None:
            call.onto, call.onto_stride = onto.data_ptr(), onto.stride(0)
        return call

    @property
    def rows(self) -> int:
        return int(self._call.rows)

    @property
    def nbytes(self) -> int:
        return self._codes.nbytes + self._scales.nbytes


def pack_weights(weights: DecoderWeights, bits: int) -> DecoderWeights:
    """The same with packed linear layers, norms in float32 and embeddings in bfloat16."""
    return DecoderWeights(
        weights.embedding.bfloat16(),
        weights.positions,
        (),
        tuple(_pack_layer(layer, bits) for layer in weights.layers),
        _widen(weights.final_norm),
        _packed(weights.head, max(bits, HEAD_BITS)),
    )


def pack_projections(projections: Sequence[Projections], bits: int) -> list[Projections]:
    """The same with packed weights, and maps as `split_heads_packed` takes them."""
    return [
        Projections(
            _packed(own.qkv, bits),
            _packed(own.out, bits),
            *(_pack_map(each) for each in (own.query_map, own.key_map, own.key_shift)),
        )
        for own in projections
    ]


def _pack_map(numbers: Tensor | None) -> Tensor | None:
    return numbers if numbers is None or numbers.shape[-1] > MOST_DIM else numbers.float().contiguous()


def _pack_layer(layer: LayerWeights, bits: int) -> LayerWeights:
    post = (layer.post_attention_norm, layer.post_mlp_norm)
    norm = layer.head_norm
    post_attention, post_mlp = (None if norm is None else _widen(norm) for norm in post)
    return LayerWeights(
        attention_norm=_widen(layer.attention_norm),
        mlp_norm=_widen(layer.mlp_norm),
        mlp=Mlp(_packed(layer.mlp.up, bits), layer.mlp.gate, _packed(layer.mlp.down, bits)),
        head_norm=None if norm is None else replace(norm, weight=norm.weight.float().contiguous()),
        post_attention_norm=post_attention,
        post_mlp_norm=post_mlp,
    )


def _packed(linear: Linear, bits: int) -> Linear:
    return PackedLinear(linear, bits) if isinstance(linear, TorchLinear) else linear


def _widen(norm: Norm) -> Norm:
    return replace(norm, weight=norm.weight.float(), bias=None if norm.bias is None else norm.bias.float())
