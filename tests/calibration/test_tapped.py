import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvfold.calibration.tapped import TILE, tapped_attention

D, KV_HEADS, GROUP, SCALE = 8, 2, 3, 0.4
LONG = TILE + 60  # more than one tile of queries
WINDOWS = [None, 1, 50, LONG + 1]


def inputs(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, H, d], k and v [T, G, d], all requiring gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, heads, D) for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)]
    q, k, v = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    return q, k, v


def starts(tokens: int, recent: int, sinks: int, unit: int) -> Tensor:
    """First recent position of each query when whole units are sealed, int64 [T]."""
    units = (torch.arange(tokens) + 1 - sinks - recent).div(unit, rounding_mode="floor").clamp(min=0)
    return sinks + units * unit


def naive(
    q: Tensor, k: Tensor, v: Tensor, far_k: Tensor, far_v: Tensor, window: int | None, near_start: Tensor, sinks: int
) -> Tensor:
    """All scores at once; far_k and far_v [T, G, d] are added to keys and values in their far use alone."""
    position = torch.arange(len(q))
    distance = position[:, None] - position
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    far = (position >= sinks) & (position < near_start[:, None])
    k, v, far_k, far_v = (x.repeat_interleave(GROUP, 1).transpose(0, 1) for x in (k, v, far_k, far_v))
    scores = q.transpose(0, 1) @ k.mT + far * (q.transpose(0, 1) @ far_k.mT)
    p = (SCALE * scores).masked_fill(~seen, float("-inf")).softmax(-1)
    return (p @ v + (p * far) @ far_v).transpose(0, 1)


@pytest.mark.parametrize("window", WINDOWS)
def test_forward_is_plain_attention(window: int | None) -> None:
    q, k, v = inputs(LONG)
    mask = torch.ones(LONG, LONG, dtype=torch.bool).tril()
    if window is not None:
        mask &= ~torch.ones(LONG, LONG, dtype=torch.bool).tril(-window)
    heads = (x.transpose(0, 1) for x in (q, k.repeat_interleave(GROUP, 1), v.repeat_interleave(GROUP, 1)))
    expected = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=SCALE).transpose(0, 1)
    out = tapped_attention(q, k, v, SCALE, window, starts(LONG, 20, 4, 1), 4, lambda dk, dv: None)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("tokens", "recent", "sinks", "unit"), [(LONG, 20, 4, 1), (LONG, 30, 0, 16), (9, 3, 2, 1)])
def test_gradients_are_those_of_the_naive_version(
    tokens: int, recent: int, sinks: int, unit: int, window: int | None
) -> None:
    near_start = starts(tokens, recent, sinks, unit)
    seed = torch.randn(tokens, KV_HEADS * GROUP, D, generator=torch.Generator().manual_seed(1))
    leaves = inputs(tokens)
    perturbation = [torch.zeros(tokens, KV_HEADS, D, requires_grad=True) for _ in range(2)]
    out = naive(*leaves, *perturbation, window, near_start, sinks)
    expected = torch.autograd.grad((out * seed).sum(), [*leaves, *perturbation])

    received: list[tuple[Tensor, Tensor]] = []
    leaves = inputs(tokens)
    out = tapped_attention(*leaves, SCALE, window, near_start, sinks, lambda dk, dv: received.append((dk, dv)))
    got = torch.autograd.grad((out * seed).sum(), leaves)
    for gradient, wanted in zip(got, expected[:3], strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4)
    assert len(received) == 1
    for gradient, wanted in zip(received[0], expected[3:], strict=True):
        torch.testing.assert_close(gradient, wanted.transpose(0, 1), rtol=1e-3, atol=1e-4)
    if window is not None and window <= recent:
        assert all(float(far.abs().max()) < 1e-4 for far in received[0])  # every key it sees is near


def test_nothing_is_far_while_all_tokens_are_recent() -> None:
    leaves, received = inputs(30), []
    out = tapped_attention(
        *leaves, SCALE, None, torch.zeros(30, dtype=torch.int64), 0, lambda *far: received.extend(far)
    )
    out.sum().backward()
    assert all(float(far.abs().max()) < 1e-5 for far in received)
