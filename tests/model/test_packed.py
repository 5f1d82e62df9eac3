"""Packed linear layers against products spelt out: the codes unpacked one by one, activations rounded as documented."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvfold.errors import ConfigError, KernelsUnavailable
from kvfold.model.elementwise import Gate, Norm
from kvfold.model.linear import TorchLinear
from kvfold.model.packed import PackedLinear, weight_bits
from kvfold.model.packing import GROUPS, pack
from kvfold.native.library import find_kernels

KERNELS = ("portable", "avx2", "avx512-vnni", "avx512-vnni-bf16")


def there(name: str) -> bool:
    try:
        return bool(find_kernels(name))
    except KernelsUnavailable:
        return False


def unpacked(codes: Tensor, scales: Tensor, rows: int, inputs: int, bits: int) -> Tensor:
    """Weights float64 [rows, inputs], by the layout that csrc/linear.h describes."""
    group = GROUPS[bits]
    width = -(-inputs // group) * group
    result = torch.zeros(-(-rows // 16) * 16, width, dtype=torch.float64)
    if bits == 16:
        numbers = codes.view(torch.bfloat16).view(-1, width // 2, 16, 2).double()
        result = numbers.transpose(1, 2).reshape(-1, width)
    else:
        for block, four, row, place in _places(result.shape[0], width):
            at = ((block * width // 4 + four) * 16 + row) * 4 + place
            if bits == 8:
                code = int(codes[at]) - 128
            else:
                pair = ((block * width // 8 + four // 2) * 16 + row) * 4 + place
                code = int(codes[pair]) >> 4 * (four % 2) & 15
            column = 4 * four + place
            own = scales[block, column // group].double()
            result[16 * block + row, column] = code * own[row] if bits == 8 else code * own[0, row] + own[1, row]
    return result[:rows, :inputs]


def _places(rows: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    for row in range(rows):
        for column in range(width):
            yield row // 16, column // 4, row % 16, column % 4


def rounded(x: Tensor, bits: int) -> Tensor:
    """Activations as coded products see them, float64."""
    if bits == 16:
        return x.double()
    group = GROUPS[bits]
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % group)).unflatten(1, (-1, group))
    most = padded.abs().amax(-1, keepdim=True)
    codes = torch.where(most == 0, 0.0, padded * (127 / most)).round()  # in float32: a tie is to fall the same way
    return (codes.double() * (most / 127)).flatten(1)[:, : x.shape[1]]


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_packing_keeps_weights_to_half_a_step(bits: int) -> None:
    weight = torch.randn(35, 71, generator=torch.Generator().manual_seed(bits))
    weight[3] = 0
    weight[4] *= 1e-9
    weight[5] *= 1e9
    found = unpacked(*pack(weight, bits), 35, 71, bits)
    group = GROUPS[bits]
    most = torch.nn.functional.pad(weight.abs(), (0, -71 % group)).unflatten(1, (-1, group)).amax(-1)
    step = {16: 2**-7, 8: 1 / 127, 4: 2 / 15 + 2**-6}[bits]  # ends are rounded to bfloat16, too
    bound = (most * step / 2 * 1.01).repeat_interleave(group, 1)[:, :71]
    assert ((found - weight).abs() <= bound).all()


@given(
    rows=st.integers(1, 70),
    inputs=st.integers(1, 140),
    tokens=st.integers(1, 40),
    bits=st.sampled_from([16, 8, 4]),
    wide=st.booleans(),
    biased=st.booleans(),
    added=st.booleans(),
    kernels=st.sampled_from(KERNELS),
    seed=st.integers(0, 2**20),
)
def test_products_are_those_of_the_codes(
    rows: int, inputs: int, tokens: int, bits: int, wide: bool, biased: bool, added: bool, kernels: str, seed: int
) -> None:
    if not there(kernels):
        return
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float32 if wide else torch.bfloat16
    weight = torch.randn(rows, inputs, generator=generator)
    bias = torch.randn(rows, generator=generator) if biased else None
    x = torch.randn(tokens, inputs + 3, generator=generator).to(dtype)[:, 2:-1]
    onto = torch.randn(tokens, rows + 1, generator=generator).to(dtype)[:, 1:] if added else None
    linear = PackedLinear(TorchLinear(weight, bias), bits, kernels)
    weights = unpacked(*pack(weight, bits), rows, inputs, bits)
    expected = rounded(x, bits) @ weights.T + (0 if bias is None else bias) + (0 if onto is None else onto)
    tolerance = 2e-5 if wide else 1e-2
    # Between two codes a number may be rounded either way: compilers are free to join a product and a sum.
    tie = 0.0 if bits == 16 else float(x.float().abs().max() / 127 * weights.abs().max())
    bound = tolerance * inputs**0.5 + tie
    torch.testing.assert_close(linear(x, onto=onto).double(), expected, rtol=tolerance, atol=bound)


@pytest.mark.parametrize("kernels", [name for name in KERNELS if there(name)])
@pytest.mark.parametrize(
    "before",
    [
        Norm("rms", torch.linspace(0.5, 2, 90), None, 1e-5),
        Norm("layer", torch.linspace(0.5, 2, 90), torch.linspace(-1, 1, 90), 1e-3),
        *(Gate(kind, gated) for kind in ("silu", "gelu", "gelu_tanh", "relu") for gated in (True, False)),
    ],
    ids=str,
)
def test_what_comes_before_is_what_torch_computes(before: Norm | Gate, kernels: str) -> None:
    """With weights that only copy, the input shows: 16 bits keep it, but for nothing."""
    wide = 180 if isinstance(before, Gate) and before.gated else 90
    x = 3 * torch.randn(7, wide, generator=torch.Generator().manual_seed(2)) + 0.3
    linear = PackedLinear(TorchLinear(torch.eye(90)), 16, kernels)
    torch.testing.assert_close(linear(x, before), before(x), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(bits: int, poison: float) -> None:
    x = torch.ones(3, 64)
    x[1, 7] = poison
    out = PackedLinear(TorchLinear(torch.rand(20, 64) + 0.5), bits)(x)
    assert out[[0, 2]].isfinite().all()
    assert not out[1].isfinite().any()


def test_results_do_not_depend_on_the_other_tokens_or_threads() -> None:
    x, linear = torch.randn(50, 200), PackedLinear(TorchLinear(torch.randn(130, 200)), 8)
    whole, threads = linear(x), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(linear(x), whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat([linear(x[:1]), linear(x[1:20]), linear(x[20:])]), whole)


def test_no_tokens_no_rows() -> None:
    assert PackedLinear(TorchLinear(torch.randn(5, 8)), 8)(torch.empty(0, 8)).shape == (0, 5)


def test_an_unknown_word_names_the_others() -> None:
    with pytest.raises(ConfigError, match="auto, bfloat16, int8, int4"):
        weight_bits("int3")
