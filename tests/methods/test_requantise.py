"""Quantisers of a sequence's own: never worse in squares than the calibrated ones, right for rows that moved."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.kv.frame import Mapped, Rescaled
from kvfold.methods.requantise import fitted


def stored(u: torch.Tensor, bits: torch.Tensor, step: torch.Tensor, middle: torch.Tensor) -> torch.Tensor:
    """What comes back of rows [n, d]: the nearest of 2^bits levels around 0, each by itself."""
    back = torch.empty_like(u)
    for dim, width in enumerate(bits.tolist()):
        levels = torch.arange(2**width) - (2**width - 1) / 2
        own = (u[:, dim] - middle[dim]) / step[dim]
        back[:, dim] = levels[(own[:, None] - levels).abs().argmin(1)] * step[dim] + middle[dim]
    return back


@settings(max_examples=30, deadline=None)
@given(
    widths=st.lists(st.integers(0, 8), min_size=1, max_size=6),
    spread=st.floats(0.05, 20.0),
    shift=st.floats(-30.0, 30.0),
    seed=st.integers(0, 1000),
)
def test_the_squared_error_is_no_larger_than_with_calibrated_steps(
    widths: list[int], spread: float, shift: float, seed: int
) -> None:
    bits = torch.tensor(widths)
    u = torch.randn(200, len(widths), generator=torch.Generator().manual_seed(seed)) * spread + shift
    step, middle = fitted(u, bits)
    none = torch.zeros_like(middle)
    error = (stored(u, bits, step, middle) - u).square().sum(0)
    calibrated = (stored(u, bits, torch.ones_like(step), none) - u).square().sum(0)
    centred = (stored(u, bits, torch.ones_like(step), u.mean(0)) - u).square().sum(0)
    assert (error <= torch.where(bits == 1, calibrated, centred) * 1.001 + 1e-4).all()
    assert (step[bits <= 1] == 1).all()


def test_rows_that_moved_and_grew_are_stored_as_well_as_calibrated_ones() -> None:
    u = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0))
    bits = torch.tensor([2, 4, 6])
    sizes = torch.tensor([1.0, 3.0, 9.0])  # a standard deviation in steps where the levels fit best
    rows = u * sizes
    for factor, shift in ((1.0, 0.0), (2.5, 40.0), (0.5, -7.0)):
        moved = rows * factor + shift
        step, middle = fitted(moved, bits)
        error = (stored(moved, bits, step, middle) - moved).square().mean(0) / moved.var(0)
        assert (error < torch.tensor([0.13, 0.014, 0.002])).all(), (factor, error)


def test_a_rescaled_frame_brings_rows_back_and_turns_queries_alike() -> None:
    generator = torch.Generator().manual_seed(1)
    forward = torch.randn(2, 3, 8, 8, generator=generator)
    backward = torch.linalg.inv(forward).mT
    shift = torch.randn(2, 3, 8, generator=generator)
    origin = -(backward @ shift[..., None])[..., 0]
    frame = Rescaled.of(
        Mapped(forward, backward, shift, origin),
        torch.rand(2, 3, 8, generator=generator) + 0.5,
        torch.randn(2, 3, 8, generator=generator),
    )
    heads = torch.tensor([2, 0])
    x, q = torch.randn(2, 2, 50, 8, generator=generator)
    u = frame.into(1, heads, x)
    torch.testing.assert_close(frame.lift(1, heads, u) + frame.origin[1, heads][:, None], x, rtol=2e-3, atol=2e-3)
    scores = frame.turn(1, heads, q) @ u.mT + (q @ frame.origin[1, heads][..., None])
    torch.testing.assert_close(scores, q @ x.mT, rtol=5e-3, atol=5e-3)
    assert frame.nbytes == 2 * 3 * 8 * (2 + 2 + 4)
