"""Sequences taken through pages by a backend, cut into steps."""

import torch
from torch import Tensor

from kvfold.attention.base import AttentionBackend, SequenceStep
from kvfold.kv.layout import CacheLayout
from kvfold.kv.pool import PagePool
from kvfold.kv.tables import PageTables

Inputs = list[list[tuple[Tensor, Tensor, Tensor]]]  # [sequence][layer]: q [T, H, d], k and v [T, G, d]
Results = list[list[tuple[Tensor, Tensor]]]  # [sequence][layer]: output [T, H, d], log-sum-exp [T, H]


def stepped(
    backend: AttentionBackend,
    layout: CacheLayout,
    inputs: Inputs,
    cuts: list[list[int]],
    scale: float,
    pages: int = 4000,
) -> Results:
    """What a backend makes of sequences that come in pieces of `cuts` tokens, batched; checks that no page is lost."""
    pool = PagePool(pages, layout.page_bytes)
    pool.data.random_()  # whatever earlier owners left must not matter
    tables = [PageTables(layout) for _ in inputs]
    results: list[list[tuple[list[Tensor], list[Tensor]]]] = [[([], []) for _ in layout.windows] for _ in inputs]
    for step in range(max(map(len, cuts))):
        steps, members, first = [], [], 0
        for i, cut in enumerate(cuts):
            if step < len(cut):
                tables[i].reserve(pool, tables[i].length + cut[step])
                steps.append(SequenceStep(tables[i], first, cut[step]))
                members.append(i)
                first += cut[step]
        plan = backend.plan(pool, layout, steps, scale)
        for layer in range(len(layout.windows)):
            parts = [
                [x[s.tables.length : s.tables.length + s.count] for x in inputs[i][layer]]
                for i, s in zip(members, steps, strict=True)
            ]
            out, lse = plan.attend(layer, *(torch.cat(x) for x in zip(*parts, strict=True)))
            for i, s in zip(members, steps, strict=True):
                results[i][layer][0].append(out[s.first : s.first + s.count])
                results[i][layer][1].append(lse[s.first : s.first + s.count])
        for s in steps:
            s.tables.advance(pool, s.tables.length + s.count)
        pool.check_integrity([t.pages() for t in tables])
        assert [len(t.pages()) for t in tables] == [layout.pages(t.length) for t in tables]
    return [[(torch.cat(out), torch.cat(lse)) for out, lse in layers] for layers in results]


def random_inputs(
    lengths: list[int], layers: int, heads: int, kv_heads: int, dim: int, seed: int, dtype: torch.dtype = torch.float32
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            tuple((2 * torch.randn(n, h, dim, generator=generator)).to(dtype) for h in (heads, kv_heads, kv_heads))  # type: ignore[misc]
            for _ in range(layers)
        ]
        for n in lengths
    ]


def cut(length: int, sizes: list[int]) -> list[int]:
    """Pieces of a sequence, of these sizes over and over."""
    parts: list[int] = []
    while sum(parts) < length:
        parts.append(min(sizes[len(parts) % len(sizes)], length - sum(parts)))
    return parts
