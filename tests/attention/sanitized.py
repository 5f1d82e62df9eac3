"""Run by test_kernels_library.py in a process of its own: all kernels of a library built with sanitizers."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import kvfold.native.library as library
from kvfold.attention.cpu.backend import CpuBackend
from kvfold.attention.reference import ReferenceBackend
from kvfold.errors import KernelsUnavailable
from kvfold.kv.format import PageFormat, Row, Scale, Segment, raw_format
from kvfold.kv.layout import CacheLayout
from kvfold.kv.staged import StagedLayout, Watch
from kvfold.model.elementwise import HeadNorm, Norm
from kvfold.model.heads import split_heads
from kvfold.model.linear import Projections, TorchLinear
from kvfold.model.packed import PackedLinear
from kvfold.model.packed_heads import split_heads_packed
from kvfold.model.rope import Rotation
from tests.attention.staged_cases import FRAMES, Case, farthest, taken
from tests.attention.stepping import random_inputs, stepped


def layouts(dim: int, raw: int) -> list[CacheLayout]:
    page = 160 * dim
    near = raw_format(page, dim, raw)
    mixed = Row((Segment(raw, 1), Segment(8, 3), Segment(7, 2), Segment(5, 5), Segment(3, 7), Segment(1, 6)))
    narrow = Row((Segment(6, 3), Segment(2, dim - 5)))
    rows = [
        (16, mixed, narrow),
        (32, Row((Segment(2, dim),), Scale.CHANNEL), Row((Segment(4, dim),), Scale.TOKEN, 8)),
        (16, Row((Segment(4, dim),), Scale.STEP), Row((Segment(8, dim),), Scale.TOKEN)),
    ]
    made = [CacheLayout(((near,) * 2,), near, 0, 0, (None,), exact=True)]
    for block, key, value in rows:
        fmt = PageFormat(page, dim, block, key, value)
        made += [CacheLayout(((fmt,) * 2,), near, 3, 20, windows) for windows in ((None,), (45,))]
    return made


def staged(dim: int, raw: int, dtype: torch.dtype) -> list[Case]:
    """Coordinates of every kind, windows and watches over tracks of every kind of scale, and small blocks."""
    page = 160 * dim
    watches = (Watch(), Watch(3, power=2), Watch(power=0))
    made = []
    for index, frame in enumerate(FRAMES):
        scale = list(Scale)[index % 4]
        row = Row((Segment((4, 2, 7)[index % 3], dim),), scale)
        fmt = PageFormat(page, dim, 16, row, row)
        if frame == "selected":
            fmt = PageFormat(page, dim, 1, *(Row((Segment(raw, kept),)) for kept in (dim // 2 + 1, dim - 3)))
        for windows in ((None,), (9,)):
            layout = StagedLayout(raw_format(page, dim, raw), windows, 2, (((fmt,) * 2,),), (1.0,), watches=watches)
            made.append(Case(layout, ((frame, frame),), (150, 61), (1, 11), 3, index, dtype))
    small = PageFormat(page, dim, 2, Row((Segment(4, dim),)), Row((Segment(4, dim),), Scale.STEP))
    layout = StagedLayout(raw_format(page, dim, raw), (None,), 2, (((small,) * 2,),), (1.0,), watches=watches)
    made.append(Case(layout, (("scaled", "scaled"),), (150, 61), (1, 11), 3, 9, dtype))
    return made


def check_layers(name: str, dtype: torch.dtype) -> None:
    """Linear layers and heads of odd sizes."""
    os.environ["KVFOLD_BACKEND"] = f"cpu:{name}"
    for bits, rows, inputs, tokens in ((16, 37, 33, 5), (8, 50, 70, 14), (4, 16, 40, 1), (4, 65, 31, 25)):
        weight, x = torch.randn(rows, inputs), torch.randn(tokens, inputs).to(dtype)
        before = Norm("rms", torch.rand(inputs) + 0.5, None, 1e-5)
        linear = TorchLinear(weight, torch.randn(rows))
        onto = torch.randn(tokens, rows).to(dtype)
        found = PackedLinear(linear, bits)(x, before, onto).float()
        wrong = found - TorchLinear(weight, linear.bias)(x.float(), before, onto.float())
        assert wrong.norm() < 0.2 * found.norm(), (name, bits)
    qkv = torch.randn(5, 8, 30).to(dtype)
    maps = torch.randn(2, 30, 30) / 5
    own = Projections(linear, linear, maps, maps, torch.randn(2, 30))
    by = Rotation(*torch.rand(2, 5, 1, 30).unbind())
    norm = HeadNorm(torch.rand(6, 30) + 0.5, 1e-5)
    expected = split_heads(qkv.float(), 4, own, norm, by)
    for found, exact in zip(split_heads_packed(qkv, 4, own, norm, by), expected, strict=True):
        assert (found.float() - exact).norm() < 0.02 * exact.norm(), name


def main() -> None:
    library.__file__ = sys.argv[1]
    for name in ("portable", "avx2", "avx512-vnni", "avx512-vnni-bf16"):
        try:
            fast = CpuBackend(name)
        except KernelsUnavailable:
            continue
        for dim, raw, dtype in ((40, 16, torch.bfloat16), (64, 32, torch.float32)):
            for layout in layouts(dim, raw):
                inputs = random_inputs([301, 60], 1, 6, 2, dim, 0, dtype)
                cuts = [[70, 1, 1, 1, 228], [60]]
                results = [stepped(b, layout, inputs, cuts, 0.03, 300) for b in (fast, ReferenceBackend())]
                for sequence, reference in zip(*results, strict=True):
                    wrong = sequence[0][0].float() - reference[0][0].float()
                    assert wrong.norm() < 0.05 * reference[0][0].float().norm(), (name, layout)
            for case in staged(dim, raw, dtype):
                found, expected = (taken(b, case, 400) for b in (fast, ReferenceBackend()))
                assert farthest(found.out, expected.out) < 0.05 * max(float(x.abs().max()) for x in expected.out), case
            check_layers(name, dtype)
        print(name, "agreed")


main()
