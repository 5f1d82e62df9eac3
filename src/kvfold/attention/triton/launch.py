"""Launches of the kernels for one layer."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.attention.triton.descriptors import GATHER, PLANES, RAW, Descriptors, HeadClass
from kvfold.attention.triton.kernels.attend import attend
from kvfold.attention.triton.kernels.fields import decode_fields
from kvfold.attention.triton.kernels.merge import merge
from kvfold.attention.triton.kernels.planes import decode_planes
from kvfold.attention.triton.kernels.seal import keep, seal
from kvfold.attention.triton.step import StepData
from kvfold.attention.triton.tuning import Tuning
from kvfold.kv.layout import CacheLayout
from kvfold.kv.pool import PagePool

UNLIMITED = 2**30  # a window that hides nothing
NUMBERS = {16: torch.bfloat16, 32: torch.float32}
STORED = {16: torch.int16, 32: torch.float32}


class Launcher:
    """Everything the kernels need that no step changes: the pool as several kinds of numbers, and the descriptors."""

    def __init__(self, pool: PagePool, layout: CacheLayout, descriptors: Descriptors) -> None:
        self.layout = layout
        self.device = pool.data.device
        self._formats = descriptors
        self._page_bytes = pool.page_bytes
        kinds = (torch.uint8, torch.int16, torch.int32, torch.int64, torch.bfloat16, torch.float32)
        self._pool = {kind: pool.data.view(kind) for kind in kinds}
        self._slots = layout.near_pages * layout.near.capacity
        self._rules = (layout.sinks, layout.recent, layout.seal, max(layout.ring, 1))

    def splits(self, data: StepData, tuning: Tuning) -> int:
        """Programs per tile of queries, so that all processors have work and none too little. For any later step too,
        while tables have as many columns."""
        tiles = -(-data.far.shape[2] * int(self.layout.capacity.min()) // tuning.keys)
        wanted = -(-tuning.programs // (len(data.items) * self.layout.kv_heads))
        far = max(1, min(tiles, wanted, tuning.most_splits))
        return far if self.layout.exact else far + 1

    def run(
        self,
        layer: int,
        data: StepData,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        scale: float,
        tuning: Tuning,
        decode: bool,
        most: int,
    ) -> None:
        """Seals, stores and attends; writes the rows of these sequences to out and lse. most: new tokens of one."""
        self._seal(layer, data, k, v, most)
        if decode and not self.layout.exact:
            self._keep(layer, data, k, v, most)
        self._attend(layer, data, q, k, v, out, lse, scale, tuning, decode)
        if not decode and not self.layout.exact:
            self._keep(layer, data, k, v, most)

    def _tables(self, layer: int, data: StepData) -> tuple[Any, ...]:
        head = layer * self.layout.kv_heads
        near, far = data.near[:, head:], data.far[:, head:]
        return near, near.stride(0), near.stride(1), far, far.stride(0), far.stride(1)

    def _described(self, layer: int) -> tuple[Tensor, ...]:
        head = layer * self.layout.kv_heads
        return self._formats.pages[head:], self._formats.sides[head:], self._formats.dims[head:], self._formats.steps

    def _seal(self, layer: int, data: StepData, k: Tensor, v: Tensor, most: int) -> None:
        layout, formats = self.layout, self._formats
        # Between two steps of `most` tokens at most so many rows are sealed.
        rows = most if layout.exact else (most + layout.seal - 1) // layout.seal * layout.seal
        for heads in formats.classes[layer]:
            per = max(heads.block, 16)
            grid = (len(data.sequences), -(-rows // per), len(heads.heads))
            for side, (kind, new) in enumerate(((heads.key, k), (heads.value, v))):
                bits = kind.bits if kind.kind == RAW else 16
                seal[grid](
                    new,
                    new.stride(0),
                    new.stride(1),
                    self._pool[torch.uint8],
                    self._pool[NUMBERS[formats.near_bits]],
                    self._pool[STORED[bits]],
                    self._page_bytes,
                    *self._described(layer),
                    data.sequences,
                    *self._tables(layer, data),
                    heads.heads,
                    *self._rules,
                    layout.near.capacity,
                    side,
                    HEAD_DIM=layout.near.head_dim,
                    D=formats.padded,
                    EXACT=layout.exact,
                    NEAR_BYTES=formats.near_bits // 8,
                    BLOCK=heads.block,
                    KIND=kind.kind,
                    BITS=bits,
                    SCALE=kind.scale,
                    num_warps=4,
                )

    def _keep(self, layer: int, data: StepData, k: Tensor, v: Tensor, most: int) -> None:
        layout, formats = self.layout, self._formats
        keep[(len(data.sequences), -(-most // 16), layout.kv_heads)](
            k,
            v,
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            self._pool[STORED[formats.near_bits]],
            self._page_bytes,
            data.sequences,
            *self._tables(layer, data)[:3],
            *self._rules,
            layout.near.capacity,
            HEAD_DIM=layout.near.head_dim,
            D=formats.padded,
            NEAR_BYTES=formats.near_bits // 8,
            num_warps=2,
        )

    def _attend(
        self,
        layer: int,
        data: StepData,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        tuning: Tuning,
        decode: bool,
    ) -> None:
        layout, formats = self.layout, self._formats
        tokens, n_heads, head_dim = q.shape
        splits = self.splits(data, tuning) if decode else 1
        parts, part_lses = out, lse
        if splits > 1:
            parts = torch.zeros((splits, *q.shape), dtype=torch.float32, device=q.device)
            part_lses = torch.full((splits, tokens, n_heads), float("-inf"), device=q.device)
        group = n_heads // layout.kv_heads
        window = layout.windows[layer]
        exact = q.dtype == torch.float32
        interpreted = triton.knobs.runtime.interpret
        number = tl.float32 if exact or interpreted else tl.bfloat16  # which is not interpreted
        in_registers = splits > 1 and (interpreted or not exact)  # float32 would not fit
        for heads in formats.classes[layer]:
            planes = in_registers and heads.key.kind == heads.value.kind == PLANES
            fields = in_registers and not planes and heads.fields
            # Codes around their middle are exact in float16 and not in bfloat16.
            products = [tl.float16 if side.centred and not exact else number for side in (heads.key, heads.value)]
            if planes or fields:
                grid = len(data.sequences), len(heads.heads), splits - 1
                queries = (q, q.stride(0), q.stride(1), parts, part_lses, tokens, n_heads)
                tables = (data.sequences, *self._tables(layer, data)[3:], heads.heads)
                rules = (scale, UNLIMITED if window is None else window, *self._rules[:3], splits - 1)
                sizes: dict[str, Any] = {
                    "GROUP": group,
                    "HEAD_DIM": head_dim,
                    "D": formats.padded,
                    "M": tuning.padded(group),
                    "N": tuning.plane_keys,
                    "DTYPE": products[0],
                    "num_warps": tuning.plane_warps,
                    "num_stages": tuning.plane_stages,
                }
                described = self._described(layer)[:2]
                if planes:
                    pool = (self._pool[kind] for kind in (torch.int32, torch.int16, torch.int64))
                    bits = {"KEY_BITS": heads.key.bits, "VALUE_BITS": heads.value.bits}
                    decode_planes[grid](*queries, *pool, self._page_bytes, *described, *tables, *rules, **bits, **sizes)
                else:
                    described += (formats.fields[layer * layout.kv_heads :],)
                    decode_fields[grid](
                        *queries,
                        self._pool[torch.int16],
                        self._page_bytes,
                        *described,
                        *tables,
                        *rules,
                        WIDTHS=formats.widths,
                        **sizes,
                    )
            attend[(len(data.items), len(heads.heads), 1 if planes or fields else splits)](
                q,
                k,
                v,
                *(x.stride(i) for x in (q, k, v) for i in (0, 1)),
                parts,
                part_lses,
                tokens,
                n_heads,
                *(self._pool[kind] for kind in (torch.uint8, torch.int32, torch.int16, torch.int64)),
                self._pool[NUMBERS[formats.near_bits]],
                self._pool[NUMBERS[_raw_bits(heads)]],
                self._page_bytes,
                *self._described(layer),
                data.items,
                data.sequences,
                *self._tables(layer, data),
                heads.heads,
                scale,
                UNLIMITED if window is None else window,
                *self._rules,
                self._slots,
                layout.near.capacity,
                splits,
                splits - 1 if planes or fields else 0,
                GROUP=group,
                HEAD_DIM=head_dim,
                D=formats.padded,
                M=tuning.padded(group),
                N=min(tuning.keys, 32) if GATHER in (heads.key.kind, heads.value.kind) else tuning.keys,
                SPLIT=splits > 1,
                EXACT=layout.exact,
                KEEP_SINKS=layout.keeps_sinks(layer),
                DECODE=decode,
                NEAR_BYTES=formats.near_bits // 8,
                UNIT=1 if heads.block == 1 else 16,
                KEY_KIND=heads.key.kind,
                KEY_BITS=heads.key.bits,
                KEY_SCALE=heads.key.scale,
                KEY_FULL=heads.key.full,
                VALUE_KIND=heads.value.kind,
                VALUE_BITS=heads.value.bits,
                VALUE_SCALE=heads.value.scale,
                VALUE_FULL=heads.value.full,
                KEY_DTYPE=products[0],
                VALUE_DTYPE=products[1],
                NEAR_DTYPE=number,
                num_warps=tuning.warps,
                num_stages=tuning.stages,
            )
        if splits > 1:
            rows = tokens * n_heads
            merge[(rows,)](
                parts,
                part_lses,
                out,
                lse,
                rows,
                splits,
                PADDED=triton.next_power_of_2(splits),
                HEAD_DIM=head_dim,
                D=formats.padded,
                num_warps=2,
            )


def _raw_bits(heads: HeadClass) -> int:
    return max((side.bits for side in (heads.key, heads.value) if side.kind == RAW), default=16)
