import pytest
import torch
from torch import Tensor

from kvfold.calibration.quantisers import fit_quantisers, stretched
from kvfold.methods.allocation import WIDTHS

SAMPLES = 600


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def quantised(x: Tensor, offset: Tensor, step: Tensor, bits: int) -> Tensor:
    """x [n, ...] read back from codes of `bits` bits, as the page format has it."""
    top = (2**bits - 1) / 2
    return offset + step * (((x - offset) / step + top).round().clamp(0, 2 * top) - top)


def searched(x: Tensor, bits: int) -> float:
    """Least mean squared error over a fine grid of offsets and steps for samples x [n]."""
    spread = float(x.max() - x.min())
    steps = spread / (2**bits - 1) * torch.linspace(0.15, 1.3, 100)
    offsets = x.mean() + x.std() * torch.linspace(-0.8, 0.8, 61)
    read = quantised(x[:, None, None], offsets, steps[:, None], bits)
    return float((read - x[:, None, None]).square().mean(0).min())


def samples(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(SAMPLES, generator=generator)
    uniform = torch.rand(SAMPLES, generator=generator)
    return {
        "gaussian": 5 + 0.1 * normal,
        "uniform": uniform - 3,
        "laplace": normal.sign() * -uniform.clamp(min=1e-6).log(),
        "two clusters": normal.sign() * 3 + 0.3 * normal,
        "skewed": normal.exp().clamp(max=6),
    }[kind]


@pytest.mark.parametrize("kind", ["gaussian", "uniform", "laplace", "two clusters", "skewed"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_errors_are_near_those_of_a_search(kind: str, bits: int) -> None:
    x = samples(kind)
    error = fit_quantisers(x[:, None])[2][0, WIDTHS.index(bits)]
    assert float(error) <= 1.1 * searched(x, bits)


@pytest.mark.parametrize("kind", ["gaussian", "uniform", "laplace", "two clusters", "skewed"])
def test_reported_errors_are_what_codes_lose(kind: str) -> None:
    x = samples(kind)[:, None]
    offset, step, error = fit_quantisers(x)
    for i, bits in enumerate(WIDTHS):
        if bits == 0:
            lost = (x - offset[:, i]).square().mean(0)
        elif bits == 16:
            lost = torch.zeros(1)
        else:
            lost = (x - quantised(x, offset[:, i], step[:, i], bits)).square().mean(0)
        torch.testing.assert_close(error[:, i], lost, rtol=0.02, atol=1e-9)


def test_errors_fall_with_bits() -> None:
    x = torch.randn(2, 3, 400, 5) * torch.rand(5).mul(4).exp()
    offset, step, error = fit_quantisers(x)
    assert offset.shape == step.shape == error.shape == (2, 3, 5, len(WIDTHS))
    assert (error.diff(dim=-1) <= 0).all()
    assert (step > 0).all()
    torch.testing.assert_close(error[..., 0], x.var(-2, correction=0))
    # Every bit is worth about 6 dB of a Gaussian's power, somewhat less once the tails count.
    ratio = error[..., 1:7] / error[..., :6]
    assert ((ratio > 0.2) & (ratio < 0.45)).all()


def test_dimensions_are_fitted_each_for_itself() -> None:
    x = torch.randn(300, 4) * torch.tensor([1.0, 10.0, 0.01, 3.0]) + torch.tensor([0.0, 50.0, 1.0, -3.0])
    together = fit_quantisers(x)
    for dim in range(4):
        for whole, alone in zip(together, fit_quantisers(x[:, dim : dim + 1]), strict=True):
            torch.testing.assert_close(whole[dim], alone[0], rtol=1e-4, atol=1e-6)


def test_a_constant_dimension_is_stored_as_it_is() -> None:
    x = torch.full((50, 2), 7.0)
    offset, step, error = fit_quantisers(x)
    assert step.isfinite().all()
    assert (step > 0).all()
    assert float(error.max()) < 1e-9
    for i, bits in enumerate(WIDTHS[1:-1], 1):
        torch.testing.assert_close(quantised(x, offset[:, i], step[:, i], bits), x)


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "skewed"])
def test_stretched_rows_make_room_for_a_text_that_reaches_further(kind: str) -> None:
    """Fitted to stretched rows, fine codes lose less of a text that is spread wider, and little of their own."""
    x = samples(kind)[torch.randperm(SAMPLES)][:, None]
    wider = x.mean() + 1.5 * (x - x.mean())
    plain, roomy = fit_quantisers(x), fit_quantisers(stretched(x))

    def lost(rows: Tensor, fitted: tuple[Tensor, Tensor, Tensor], bits: int) -> float:
        offset, step = (part[:, WIDTHS.index(bits)] for part in fitted[:2])
        return float((rows - quantised(rows, offset, step, bits)).square().mean())

    for bits in (4, 5, 6, 8):
        assert lost(wider, roomy, bits) < 0.7 * lost(wider, plain, bits)
        assert lost(x, roomy, bits) < 4 * lost(x, plain, bits)


def test_stretching_moves_rows_away_from_their_mean() -> None:
    x = 5 + torch.randn(2, 4000, 3)
    y = stretched(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y.mean(-2), x.mean(-2), rtol=0.02, atol=0.02)
    distance, before = ((z - x.mean(-2, keepdim=True)).abs() for z in (y, x))
    assert (distance >= 0.999 * before).all()
    assert (y.std(-2) > 1.1 * x.std(-2)).all()
