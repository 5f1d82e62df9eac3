"""Queries, keys and values from one projection, by the compiled kernels."""

import ctypes
from ctypes import c_double, c_int64, c_void_p

import torch
from torch import Tensor

from kvfold.model.elementwise import HeadNorm
from kvfold.model.heads import QKV, views
from kvfold.model.linear import Projections
from kvfold.model.rope import Rotation
from kvfold.native.library import MOST_DIM as MOST_DIM
from kvfold.native.library import find_kernels, library


class HeadsCall(ctypes.Structure):
    """`kvfold_heads` of heads.cpp."""

    _fields_ = (
        ("qkv", c_void_p),
        *((name, c_int64) for name in ("stride", "tokens", "heads", "kv_heads", "dim", "wide")),
        ("gain", c_void_p),
        ("eps", c_double),
        *((name, c_void_p) for name in ("cos", "sin", "query_map", "key_map", "key_shift", "kernels")),
    )


def split_heads_packed(
    qkv: Tensor, heads: int, weights: Projections, norm: HeadNorm | None, by: Rotation | None
) -> QKV:
    """`SplitHeads` in place. Angles, gains and maps are float32 and dense; d is at most MOST_DIM."""
    library().kvfold_turn_heads(ctypes.byref(heads_call(qkv, heads, weights, norm, by)))
    return views(qkv, heads)


def heads_call(qkv: Tensor, heads: int, weights: Projections, norm: HeadNorm | None, by: Rotation | None) -> HeadsCall:
    """What the kernels are to compute; the tensors must outlive it."""
    tokens, both, dim = qkv.shape
    call = HeadsCall(qkv.data_ptr(), qkv.stride(0), tokens, heads, (both - heads) // 2, dim)
    call.wide, call.kernels = qkv.dtype == torch.float32, find_kernels()
    if norm is not None:
        call.gain, call.eps = norm.weight.data_ptr(), norm.eps
    if by is not None:
        call.cos, call.sin = by.cos.data_ptr(), by.sin.data_ptr()
    for name in ("query_map", "key_map", "key_shift"):
        given = getattr(weights, name)
        if given is not None:
            setattr(call, name, given.data_ptr())
    return call
