"""Staged sequences with random rows, taken through one step by two backends: the same pages, the same sums."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.attention.base import AttentionBackend, SequenceStep
from kvfold.kv.access import write_blocks
from kvfold.kv.format import PageFormat
from kvfold.kv.frame import Basis, Factored, Frame, Mapped, Rescaled, Scaled, Selected
from kvfold.kv.packing import encode
from kvfold.kv.pool import PagePool
from kvfold.kv.staged import StagedLayout, Watch
from kvfold.kv.staged_tables import StagedTables

FRAMES = ("none", "mapped", "plain mapped", "rescaled", "scaled", "plain scaled", "factored", "selected")


def frame_of(kind: str, layout: StagedLayout, kept: int, g: torch.Generator) -> Frame | None:
    """Coordinates that do not blow numbers up. kept: dimensions that are stored."""
    dim = layout.raw.head_dim
    shape = (layout.layers, layout.kv_heads, dim)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=g)

    back, origin = random(*shape, dim) / dim**0.5, random(*shape)
    scale = random(*shape).abs() + 0.5
    mapped = Mapped(torch.zeros_like(back), back, random(*shape), None if kind.startswith("plain") else origin)
    if kind == "selected":
        index = torch.stack([torch.randperm(dim, generator=g)[:kept] for _ in range(layout.heads)])
        return Selected(index.view(*shape[:2], kept).short(), dim)
    frames: dict[str, Frame] = {
        "mapped": mapped,
        "plain mapped": mapped,
        "rescaled": Rescaled.of(mapped, scale, random(*shape)),
        "scaled": Scaled(scale.half(), origin.half()),
        "plain scaled": Scaled(scale.half()),
        "factored": Factored((random(shape[0], dim, dim) / dim**0.5).half()),
    }
    return frames.get(kind)


@dataclass(frozen=True)
class Case:
    """Sequences of `held` tokens at most per track and head (0 in some of them), to which `counts` tokens come."""

    layout: StagedLayout
    frames: tuple[tuple[str, str], ...]  # of keys and values, per coded track
    held: tuple[int, ...]
    counts: tuple[int, ...]
    group: int
    seed: int
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Found:
    """out [T, H, d] and lse [T, H] per layer; mass: per sequence, watch and track; data: the pool's pages."""

    out: list[Tensor]
    lse: list[Tensor]
    mass: list[dict[Watch, list[Tensor]]]
    data: Tensor


def _filled(pool: PagePool, case: Case, held: int, g: torch.Generator) -> StagedTables:
    layout = case.layout
    tables = StagedTables(layout, context=held + 9)
    for index, (key, value) in enumerate(case.frames):
        # A frame is of all heads, which keep as many dimensions here.
        fmt = layout.coded[index][0][0]
        sides = frame_of(key, layout, fmt.key.kept, g), frame_of(value, layout, fmt.value.kept, g)
        tables.bases[index] = Basis(*sides) if any(sides) else None
    for layer, window in enumerate(layout.windows):
        for head in range(layout.kv_heads):
            for track in range(layout.tracks):
                fmt = layout.format(track, layer, head)
                count = int(torch.randint(held + 1, (1,), generator=g))
                if window is not None:  # the newest tokens, all uncompressed
                    count = 0 if track else min(held, window + 3)
                _fill(pool, tables, fmt, (track, layer * layout.kv_heads + head), count - count % fmt.block, g)
    tables.length = held
    width = int(tables.rows.max()) + 1
    for tracks in tables.mass.values():
        tracks[:] = [torch.rand(layout.heads, width, generator=g) for _ in tracks]
    return tables


def _fill(
    pool: PagePool, tables: StagedTables, fmt: PageFormat, where: tuple[int, int], count: int, g: torch.Generator
) -> None:
    if not count:
        return
    tables.extend(pool, *where, count)
    sizes = (count // fmt.block, fmt.block, fmt.head_dim)
    blocks = encode(fmt, torch.randn(sizes, generator=g), torch.randn(sizes, generator=g))
    index = torch.arange(len(blocks))
    pages = torch.from_numpy(tables.pages_of[where]).long()[index // fmt.blocks]
    write_blocks(pool.data, fmt, pages, index % fmt.blocks, blocks)


def taken(backend: AttentionBackend, case: Case, pages: int) -> Found:
    """What a backend makes of a case."""
    layout = case.layout
    g = torch.Generator().manual_seed(case.seed)
    pool = PagePool(pages, layout.page_bytes)
    pool.data.random_(generator=g)  # whatever earlier owners left must not matter
    steps: list[SequenceStep[StagedTables]] = []
    first = 0
    for held, count in zip(case.held, case.counts, strict=True):
        tables = _filled(pool, case, held, g)
        tables.reserve(pool, held + count)
        steps.append(SequenceStep(tables, first, count))
        first += count
    dim = layout.raw.head_dim
    plan = backend.plan(pool, layout, steps, 1 / dim**0.5)
    outs, lses = [], []
    for layer in range(layout.layers):
        heads = (case.group * layout.kv_heads, layout.kv_heads, layout.kv_heads)
        out, lse = plan.attend(layer, *(torch.randn(first, h, dim, generator=g).to(case.dtype) for h in heads))
        outs.append(out)
        lses.append(lse)
    return Found(outs, lses, [step.tables.mass for step in steps], pool.data)


def farthest(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference between two lists of tensors."""
    return max(float((a.float() - b.float()).abs().max()) for a, b in zip(found, expected, strict=True))
