"""Norm, rotation and maps in place, by every set of instructions, against torch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfold.errors import KernelsUnavailable
from kvfold.model.elementwise import HeadNorm
from kvfold.model.heads import split_heads
from kvfold.model.linear import Projections, TorchLinear
from kvfold.model.packed_heads import split_heads_packed
from kvfold.model.rope import rotation
from kvfold.native.library import find_kernels

UNUSED = TorchLinear(torch.empty(0, 0))


@pytest.mark.parametrize("kernels", ["portable", "avx2", "avx512-vnni"])
def test_heads_are_those_of_torch(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFOLD_BACKEND", f"cpu:{kernels}")
    try:
        find_kernels()
    except KernelsUnavailable:
        pytest.skip("not on this machine")
    compare_with_torch()


@given(
    tokens=st.integers(1, 30),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    half=st.integers(1, 60),
    wide=st.booleans(),
    with_norm=st.booleans(),
    with_rope=st.booleans(),
    with_maps=st.booleans(),
    seed=st.integers(0, 2**20),
)
def compare_with_torch(
    tokens: int,
    kv_heads: int,
    group: int,
    half: int,
    wide: bool,
    with_norm: bool,
    with_rope: bool,
    with_maps: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    heads, dim = kv_heads * group, 2 * half

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    by = rotation(random(half).abs(), 1.1, torch.arange(tokens) * 7, torch.float32) if with_rope else None
    norm = HeadNorm(random(heads + kv_heads, dim), 1e-5) if with_norm else None
    maps = [random(kv_heads, dim, dim), random(kv_heads, dim, dim), random(kv_heads, dim)] if with_maps else []
    own = Projections(UNUSED, UNUSED, *maps)
    qkv = random(tokens, heads + 2 * kv_heads, dim).to(torch.float32 if wide else torch.bfloat16)
    expected = [x.clone() for x in split_heads(qkv.float(), heads, own, norm, by)]
    found = split_heads_packed(qkv, heads, own, norm, by)
    assert [x.dtype for x in found] == [qkv.dtype] * 3
    for one, other in zip(found, expected, strict=True):
        bound = 1e-5 if wide else 1e-2
        torch.testing.assert_close(one.float(), other, rtol=bound, atol=bound * max(1.0, float(other.abs().max())))
