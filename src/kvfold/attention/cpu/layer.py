"""What all calls of the kernels have in common: one layer's tensors, in and out."""

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_void_p
from typing import Any

import torch
from torch import Tensor

from kvfold.attention.base import SequenceStep
from kvfold.attention.cpu.calls import Layer, Step
from kvfold.kv.pool import PagePool


def step_infos(steps: Sequence[SequenceStep[Any]]) -> ctypes.Array[Step]:
    """The steps as the kernels take them; must live as long as calls point to it."""
    return (Step * len(steps))(*(Step(s.tables.length, s.first, s.count) for s in steps))


def layer_call(pool: PagePool, kv_heads: int, steps: ctypes.Array[Step], scale: float, kernels: int) -> Layer:
    """What is the same for all layers."""
    return Layer(
        data=pool.data.data_ptr(),
        page_bytes=pool.page_bytes,
        kv_heads=kv_heads,
        scale=scale,
        steps=ctypes.cast(steps, c_void_p),
        count=len(steps),
        kernels=kernels,
    )


def run_layer(
    call: Layer, layer: int, window: int | None, q: Tensor, k: Tensor, v: Tensor, attend: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    """Fills in one layer's numbers, calls `attend` and returns what `Plan.attend` does."""
    dtype = q.dtype
    wide = dtype != torch.bfloat16
    if wide and dtype != torch.float32:
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:2], dtype=torch.float32)
    call.layer, call.group, call.dim, call.wide = layer, q.shape[1] // k.shape[1], q.shape[2], wide
    call.window = window or 0
    call.q, call.k, call.v = q.data_ptr(), k.data_ptr(), v.data_ptr()
    call.q_token, call.q_head = q.stride()[:2]
    call.k_token, call.k_head = k.stride()[:2]
    call.v_token, call.v_head = v.stride()[:2]
    call.out, call.lse = out.data_ptr(), lse.data_ptr()
    attend()
    return out.to(dtype), lse
