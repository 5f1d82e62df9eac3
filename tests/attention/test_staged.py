"""Attention over staged tracks against a version that walks token by token and knows nothing of pages."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvfold.attention.base import SequenceStep
from kvfold.attention.reference import ReferenceBackend
from kvfold.kv.access import write_blocks
from kvfold.kv.format import PageFormat, Row, Scale, Segment, raw_format
from kvfold.kv.frame import Basis, Factored, Mapped, Scaled, Selected
from kvfold.kv.packing import decode, encode
from kvfold.kv.pool import PagePool
from kvfold.kv.staged import StagedLayout, Watch
from kvfold.kv.staged_tables import StagedTables

D, G, H, PAGE, SCALE = 8, 2, 6, 1024, 0.3
WATCHES = (Watch(5), Watch(power=2), Watch(power=0, renewed=False))

Pair = tuple[Tensor, Tensor]


def coded(block: int, key: Row, value: Row) -> PageFormat:
    return PageFormat(PAGE, D, block, key, value)


FORMATS = {
    "int8": coded(1, Row((Segment(8, 8),), Scale.TOKEN), Row((Segment(8, 8),), Scale.TOKEN, 4)),
    "kivi": coded(32, Row((Segment(2, 8),), Scale.CHANNEL), Row((Segment(4, 8),), Scale.TOKEN, 4)),
    "step": coded(2, Row((Segment(4, 8),)), Row((Segment(4, 8),), Scale.STEP)),
    "mixed": coded(16, Row((Segment(6, 2), Segment(3, 3))), Row((Segment(8, 1), Segment(1, 4)))),
    "selected": coded(1, Row((Segment(32, 5),)), Row((Segment(32, 8),))),
}
FRAMES = ["none", "mapped", "scaled", "factored"]  # the last two need all dimensions


def frame_of(kind: str, layers: int, seed: int) -> tuple[object, Callable[[int, int, Tensor], Tensor]]:
    """A frame, and how it brings stored rows [n, kept] of a layer and head to the model's coordinates [n, D]."""
    g = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.randn(layers, *sizes, generator=g)

    def padded(u: Tensor) -> Tensor:
        return torch.nn.functional.pad(u, (0, D - u.shape[1]))

    if kind == "none":
        return None, lambda layer, head, u: padded(u)
    if kind == "scaled":
        scale, origin = (random(G, D).abs() + 0.5).half(), random(G, D).half()
        return Scaled(scale, origin), lambda at, h, u: padded(u) * scale[at, h].float() + origin[at, h].float()
    if kind == "mapped":
        back, origin = random(G, D, D), random(G, D)
        mapped = Mapped(torch.linalg.inv(back).mT, back, random(G, D), origin)
        return mapped, lambda at, h, u: padded(u) @ back[at, h].T + origin[at, h]
    if kind == "factored":
        factor = random(D, D).half()
        return Factored(factor), lambda at, h, u: padded(u) @ factor[at].float().T
    index = torch.stack([torch.randperm(D, generator=g)[:5].sort().values for _ in range(layers * G)])
    index = index.view(layers, G, 5)

    def spread(layer: int, head: int, u: Tensor) -> Tensor:
        out = torch.zeros(len(u), D)
        out[:, index[layer, head]] = u
        return out

    return Selected(index.short(), D), spread


class Sequence:
    """Tables with random rows in their tracks, and the same rows in the model's coordinates."""

    def __init__(self, pool: PagePool, layout: StagedLayout, kinds: list[str], held: int, seed: int) -> None:
        self.layout = layout
        g = torch.Generator().manual_seed(seed)
        self.tables = StagedTables(layout, context=held + 9)
        self.rows: dict[tuple[int, int], list[Pair]] = {}
        lifts = []
        for track, kind in enumerate(kinds, 1):
            frames = [frame_of(kind, layout.layers, seed + 7 * track + side) for side in range(2)]
            if kind == "selected":
                frames[1] = frame_of("none", layout.layers, 0)
            self.tables.bases[track - 1] = None if kind == "none" else Basis(frames[0][0], frames[1][0])  # type: ignore[arg-type]
            lifts.append([lift for _, lift in frames])
        for layer in range(layout.layers):
            window = layout.windows[layer]
            for head in range(G):
                for track in range(layout.tracks):
                    count = int(torch.randint(held + 1, (1,), generator=g))
                    fmt = layout.format(track, layer, head)
                    if window is not None:  # the newest tokens, all uncompressed
                        count = 0 if track else min(held, window + 3)
                    count -= count % fmt.block
                    rows = [torch.zeros(0, D)] * 2
                    if count:
                        blocks = self._write(pool, fmt, track, layer * G + head, count, g)
                        rows = [x[0].T for x in decode(fmt, blocks[None])]
                    keys, values = rows
                    if track and count:
                        keys, values = (
                            f(layer, head, x) for f, x in zip(lifts[track - 1], (keys, values), strict=True)
                        )
                    self.rows.setdefault((layer, head), []).append((keys, values))
        self.tables.length = held
        width = int(self.tables.rows.max()) + 1
        for tracks in self.tables.mass.values():
            tracks[:] = [torch.zeros(layout.heads, width) for _ in tracks]

    def _write(self, pool: PagePool, fmt: PageFormat, track: int, head: int, count: int, g: torch.Generator) -> Tensor:
        self.tables.extend(pool, track, head, count)
        data = [2 * torch.randn(count // fmt.block, fmt.block, D, generator=g) for _ in range(2)]
        blocks = encode(fmt, *data)
        where = torch.arange(len(blocks))
        pages = torch.from_numpy(self.tables.pages_of[track, head]).long()[where // fmt.blocks]
        write_blocks(pool.data, fmt, pages, where % fmt.blocks, blocks)
        return blocks


def naive(
    sequence: Sequence, layer: int, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, dict[Watch, dict[tuple[int, int], Tensor]]]:
    """Query by query. Also what rows received by watch and (track, head), new tokens after the stored ones."""
    tables, window = sequence.tables, sequence.layout.windows[layer]
    out, lse = torch.zeros(q.shape), torch.zeros(q.shape[:2])
    mass: dict[Watch, dict[tuple[int, int], Tensor]] = {w: {} for w in WATCHES}
    for h in range(H):
        head = h // (H // G)
        tracks = sequence.rows[layer, head]
        for t in range(len(q)):
            position = tables.length + t
            keys = torch.cat([tracks[0][0], k[: t + 1, head], *(x[0] for x in tracks[1:])])
            values = torch.cat([tracks[0][1], v[: t + 1, head], *(x[1] for x in tracks[1:])])
            first = len(tracks[0][0])
            visible = torch.ones(len(keys), dtype=torch.bool)
            if window is not None:
                for row in range(first + t + 1):
                    visible[row] = position - (tables.length - first + row) < window
            scores = (keys @ q[t, h] * SCALE)[visible]
            weights = torch.zeros(len(keys))
            weights[visible] = scores.softmax(0)
            out[t, h], lse[t, h] = weights @ values, scores.logsumexp(0)
            for watch in WATCHES:
                last = watch.window is None or position >= tables.next_event - watch.window
                powered = visible.float() if watch.power == 0 else weights**watch.power
                start = 0
                for track, stored in enumerate(tracks):
                    size = len(stored[0]) + (t + 1 if track == 0 else 0)
                    total = mass[watch].setdefault((track, head), torch.zeros(len(stored[0]) + len(q) * (track == 0)))
                    total[:size] += powered[start : start + size] * last
                    start += size
    return out, lse, mass


def layout_of(kinds: list[str], windows: tuple[int | None, ...], bits: int = 32) -> StagedLayout:
    formats = [FORMATS[kind] for kind in kinds]
    # Heads of one layer may have formats of their own.
    tracks = tuple(tuple((fmt, FORMATS["int8"] if fmt.key.kept == D else fmt) for _ in windows) for fmt in formats)
    shares = (1 / max(len(kinds), 1),) * len(kinds)
    return StagedLayout(raw_format(PAGE, D, bits), windows, G, tracks, shares, watches=WATCHES)


def check(layout: StagedLayout, frames: list[str], held: list[int], counts: list[int], seed: int, size: float) -> None:
    pool = PagePool(600, PAGE)
    pool.data.random_()  # whatever earlier owners left must not matter
    sequences = [Sequence(pool, layout, frames, n, seed + i) for i, n in enumerate(held)]
    steps, first = [], 0
    for sequence, count in zip(sequences, counts, strict=True):
        sequence.tables.reserve(pool, sequence.tables.length + count)
        steps.append(SequenceStep(sequence.tables, first, count))
        first += count
    plan = ReferenceBackend().plan(pool, layout, steps, SCALE)
    g = torch.Generator().manual_seed(seed)
    for layer in range(layout.layers):
        q, k, v = (size * torch.randn(first, heads, D, generator=g) for heads in (H, G, G))
        if layout.raw.key.raw_bits == 16:
            k, v = k.bfloat16().float(), v.bfloat16().float()
        out, lse = plan.attend(layer, q, k, v)
        for sequence, step in zip(sequences, steps, strict=True):
            own = slice(step.first, step.first + step.count)
            expected_out, expected_lse, mass = naive(sequence, layer, q[own], k[own], v[own])
            torch.testing.assert_close(out[own], expected_out, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(lse[own], expected_lse, rtol=1e-4, atol=1e-3)
            for watch, rows in mass.items():
                for (track, head), expected in rows.items():
                    found = sequence.tables.mass[watch][track][layer * G + head, : len(expected)]
                    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_attention_and_mass_equal_the_token_by_token_version(data: st.DataObject) -> None:
    kinds = data.draw(st.lists(st.sampled_from(sorted(set(FORMATS) - {"selected"})), max_size=2), label="formats")
    windows = data.draw(st.sampled_from([(None,), (9, None), (40,)]), label="windows")
    frames = [data.draw(st.sampled_from(FRAMES[:2] if kind == "mixed" else FRAMES), label="frame") for kind in kinds]
    held = data.draw(st.lists(st.integers(0, 90), min_size=1, max_size=3), label="held")
    counts = [data.draw(st.sampled_from([1, 1, 2, 9])) for _ in held]
    layout = layout_of(kinds, windows, data.draw(st.sampled_from([16, 32])))
    check(layout, frames, held, counts, data.draw(st.integers(0, 99)), 1.0)


@pytest.mark.parametrize("windows", [(None,), (None, 9)])
def test_selected_channels(windows: tuple[int | None, ...]) -> None:
    check(layout_of(["selected"], windows), ["selected"], [40, 0, 70], [1, 1, 5], 3, 1.0)


def test_keys_that_get_next_to_no_attention_are_counted_as_seen() -> None:
    check(layout_of([], (None,)), [], [60], [4], 0, 12.0)


def test_tiles_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfold.attention.staged.MAX_SCORES", 400)
    check(layout_of(["step", "int8"], (None, 9)), ["scaled", "none"], [70, 20], [9, 9], 1, 1.0)
