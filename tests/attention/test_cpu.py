"""The compiled kernels against the reference: every format, every set of instructions that this machine has."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.attention.cpu.backend import CpuBackend
from kvfold.attention.cpu.calls import supported
from kvfold.attention.reference import ReferenceBackend
from kvfold.errors import KernelsUnavailable
from kvfold.kv.format import PageFormat, Row, Scale, Segment, raw_format
from kvfold.kv.layout import CacheLayout
from tests.attention.stepping import cut, random_inputs, stepped

KERNELS = ["portable", "avx2", "avx512-vnni", "avx512-vnni-bf16"]
PAGES = 600


def backend(kernels: str) -> CpuBackend:
    try:
        return CpuBackend(kernels)
    except KernelsUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True, scope="module")
def kernels_serve_long_pieces() -> Iterator[None]:
    """Where torch would be faster, too."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("kvfold.attention.cpu.backend.MANY", 10**6)
        patched.setattr("kvfold.attention.cpu.backend.MANY_CODED", 10**6)
        yield


@st.composite
def rows(draw: st.DrawFn, dim: int, block: int, scales: list[Scale], raw: int, sums: bool = False) -> Row:
    scale = draw(st.sampled_from(scales))
    widths = sorted(draw(st.lists(st.sampled_from(range(1, 9)), min_size=1, max_size=4, unique=True)), reverse=True)
    if scale is Scale.STATIC and draw(st.booleans()):
        widths = [raw, *widths]
    cuts = sorted(draw(st.lists(st.integers(1, dim), min_size=len(widths), max_size=len(widths), unique=True)))
    dims = np.diff([0, *cuts]).tolist()
    segments = tuple(Segment(w, n) for w, n in zip(widths, dims, strict=True))
    group = (
        draw(st.sampled_from([None, *(g for g in (4, 8, 32) if cuts[-1] % g == 0)])) if scale is Scale.TOKEN else None
    )
    return Row(segments, scale, group, sums and scale in (Scale.TOKEN, Scale.CHANNEL))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[CacheLayout, int, int]:
    """A layout, its query heads per KV head and its head_dim."""
    dim = draw(st.sampled_from([32, 40, 64, 80, 128, 256]))
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    group = draw(st.sampled_from([1, 2, 3, 4, 7, 8, 12]))
    raw_bits = draw(st.sampled_from([16, 16, 16, 32]))
    windows = draw(st.sampled_from([(None,), (None,), (9, None), (40,), (150,)]))
    page = 160 * dim  # holds one block of most
    if draw(st.integers(0, 4)) == 0:
        near = raw_format(page, dim, raw_bits)
        return CacheLayout(((near,) * kv_heads,) * len(windows), near, 0, 0, windows, exact=True), group, dim
    block = draw(st.sampled_from([16, 16, 32, 64]))
    # With sums on both sides the reference would multiply codes, as HACK does.
    summed = draw(st.sampled_from([(False, False), (True, False), (False, True)]))
    sides = st.tuples(*(rows(dim, block, list(Scale), raw_bits, sums) for sums in summed))
    drawn = [draw(sides) for _ in range(kv_heads)]
    page = max(page, *(key.nbytes(block) + value.nbytes(block) for key, value in drawn))
    near = raw_format(page, dim, raw_bits)
    far = [PageFormat(page, dim, block, key, value) for key, value in drawn]
    sunk = (True,) * len(windows) if draw(st.booleans()) else ()
    sinks, recent = draw(st.integers(0, 5)), draw(st.sampled_from([1, 5, 20, 40]))
    return CacheLayout((tuple(far),) * len(windows), near, sinks, recent, windows, sunk=sunk), group, dim


@pytest.mark.parametrize("kernels", KERNELS)
@settings(max_examples=10, deadline=None)
@given(made=layouts(), data=st.data())
def test_kernels_agree_with_the_reference(
    kernels: str, made: tuple[CacheLayout, int, int], data: st.DataObject
) -> None:
    fast = backend(kernels)
    layout, group, dim = made
    assert all(supported(fmt) for layer in layout.far for fmt in layer)
    lengths = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=3), label="lengths")
    sizes = [data.draw(st.lists(st.sampled_from([2, 30, 64, 200]), min_size=1, max_size=3)) for _ in lengths]
    cuts = [cut(n - min(n, 4), pieces) + [1] * min(n, 4) for n, pieces in zip(lengths, sizes, strict=True)]
    dtype = torch.bfloat16 if layout.near.key.raw_bits == 16 else torch.float32
    kv_heads = layout.kv_heads
    inputs = random_inputs(
        lengths, len(layout.windows), group * kv_heads, kv_heads, dim, data.draw(st.integers(0, 99)), dtype
    )
    scale = 0.25 / dim**0.5
    got = stepped(fast, layout, inputs, cuts, scale, PAGES)
    expected = stepped(ReferenceBackend(), layout, inputs, cuts, scale, PAGES)
    for sequence, reference in zip(got, expected, strict=True):
        for (out, lse), (out_r, lse_r) in zip(sequence, reference, strict=True):
            spread = max(float(out_r.float().pow(2).mean().sqrt()), 1e-3)
            wrong, off = (out.float() - out_r.float()) / spread, lse - lse_r
            if "vnni" in kernels:  # queries are rounded to 8 bits or 15, so that scores err by 1/8 at most (digits.h)
                assert float(wrong.pow(2).mean().sqrt()) < 0.05
                assert float(off.pow(2).mean().sqrt()) < 1 / 8
            # Elsewhere what is left is the rounding of the output, 1/256 of the largest number in it.
            assert float(wrong.abs().max()) < (0.3 if "vnni" in kernels else 0.04)
            assert float(off.abs().max()) < (0.4 if "vnni" in kernels else 1e-4)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("block", "dim"), [(16, 64), (32, 128), (48, 40)])
def test_scales_of_channels(kernels: str, block: int, dim: int) -> None:
    """Blocks with scales of their own, over more runs than are worked on at once."""
    page = 160 * dim
    near = raw_format(page, dim)
    fmt = PageFormat(page, dim, block, Row((Segment(2, dim),), Scale.CHANNEL), Row((Segment(4, dim),), Scale.TOKEN, 8))
    layout = CacheLayout(((fmt,),), near, 3, 20, (None,))
    inputs = random_inputs([701], 1, 3, 1, dim, 0)
    (got,), (expected,) = (
        stepped(b, layout, inputs, [[690, 1, 1, 9]], 0.05, 400)[0] for b in (backend(kernels), ReferenceBackend())
    )
    wrong, off = got[0].float() - expected[0].float(), got[1] - expected[1]
    assert float(wrong.norm() / expected[0].float().norm()) < (0.08 if "vnni" in kernels else 1e-5)
    assert float(off.pow(2).mean().sqrt()) < (0.02 if "vnni" in kernels else 1e-5)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("bits", "block", "dim"), [(2, 64, 64), (4, 32, 128), (8, 16, 40)])
def test_codes_with_sums(kernels: str, bits: int, block: int, dim: int) -> None:
    """HACK's pages. The reference rounds queries and weights to 8 bits as the paper does, the kernels to more."""
    page = 160 * dim
    near = raw_format(page, dim)
    key = Row((Segment(bits, dim),), Scale.TOKEN, dim // 2, sums=True)
    fmt = PageFormat(page, dim, block, key, Row((Segment(bits, dim),), Scale.CHANNEL, sums=True))
    layout = CacheLayout(((fmt,),), near, 3, 20, (None,))
    inputs = random_inputs([701], 1, 3, 1, dim, 0)
    (got,), (expected,) = (
        stepped(b, layout, inputs, [[690, 1, 1, 9]], 0.05, 400)[0] for b in (backend(kernels), ReferenceBackend())
    )
    wrong, off = got[0].float() - expected[0].float(), got[1] - expected[1]
    assert float(wrong.norm() / expected[0].float().norm()) < (0.08 if "vnni" in kernels else 0.02)
    assert float(off.pow(2).mean().sqrt()) < 0.02
