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


def fill_steps(infos: ctypes.Array[Step], steps: Sequence[SequenceStep[Any]]) -> None:
    """The steps as the kernels take them; the array must live as long as calls point to it."""
    for info, step in zip(infos, steps, strict=True):
        info.length, info.first, info.count = step.tables.length, step.first, step.count


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


def fill_layer(
    call: Layer, layer: int, window: int | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> None:
    """One layer's numbers; the tensors must outlive the call. All but lse: float32 or bfloat16, rows dense."""
    call.layer, call.group, call.dim = layer, q.shape[1] // k.shape[1], q.shape[2]
    call.wide, call.window = q.dtype == torch.float32, window or 0
    call.q, call.k, call.v = q.data_ptr(), k.data_ptr(), v.data_ptr()
    call.q_token, call.q_head = q.stride()[:2]
    call.k_token, call.k_head = k.stride()[:2]
    call.v_token, call.v_head = v.stride()[:2]
    call.out, call.lse = out.data_ptr(), lse.data_ptr()


def run_layer(
    call: Layer, layer: int, window: int | None, q: Tensor, k: Tensor, v: Tensor, attend: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    """Fills in one layer's numbers, calls `attend` and returns what `Plan.attend` does."""
    dtype = q.dtype
    if dtype not in (torch.bfloat16, torch.float32):
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:2], dtype=torch.float32)
    fill_layer(call, layer, window, q, k, v, out, lse)
    attend()
    return out.to(dtype), lse
