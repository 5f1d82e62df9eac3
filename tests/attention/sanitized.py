"""Run by test_kernels_library.py in a process of its own: all kernels of a library built with sanitizers."""

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
                    assert wrong.abs().max() < 0.05, (name, layout)
        print(name, "agreed")


main()
