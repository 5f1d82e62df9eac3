import pytest
import torch
from torch import Tensor

from kvfold.methods.maps import stacked_map, weighted_map

HEADS, D, TOKENS = (2, 3), 8, 400


def anisotropic(generator: torch.Generator, spread: float = 1.5) -> Tensor:
    """Rows [2, 3, TOKENS, D] with very different variances along random directions."""
    scales = (spread * torch.randn(*HEADS, 1, D, generator=generator, dtype=torch.float64)).exp()
    turned = torch.linalg.qr(torch.randn(*HEADS, D, D, generator=generator, dtype=torch.float64))[0]
    return (torch.randn(*HEADS, TOKENS, D, generator=generator, dtype=torch.float64) * scales) @ turned.mT


def cut(a: Tensor, b: Tensor, rank: int) -> Tensor:
    """The projection P of rows x -> x @ P that keeps `rank` dimensions."""
    return a[..., :rank] @ b[..., :rank].mT


@pytest.fixture(params=range(3))
def rows(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(request.param)
    return anisotropic(generator), anisotropic(generator)


def test_each_map_is_undone_by_its_partner(rows: tuple[Tensor, Tensor]) -> None:
    queries, keys = rows
    q_gram, k_gram = queries.mT @ queries, keys.mT @ keys
    for a, b in (weighted_map(q_gram, k_gram), stacked_map(q_gram, k_gram), stacked_map(k_gram)):
        torch.testing.assert_close(b @ a.mT, torch.eye(D, dtype=torch.float64).expand(*HEADS, D, D))


def test_scores_are_kept_by_the_pair(rows: tuple[Tensor, Tensor]) -> None:
    queries, keys = rows
    a, b = weighted_map(queries.mT @ queries, keys.mT @ keys)
    torch.testing.assert_close((queries @ b) @ (keys @ a).mT, queries @ keys.mT)


def test_cutting_costs_the_tail_of_the_spectrum(rows: tuple[Tensor, Tensor]) -> None:
    queries, keys = rows
    a, b = weighted_map(queries.mT @ queries, keys.mT @ keys)
    singular = torch.linalg.svdvals(queries @ keys.mT)[..., :D]  # of all scores
    for rank in range(D + 1):
        lost = queries @ (keys - keys @ cut(a, b, rank)).mT
        expected = singular[..., rank:].square().sum(-1)
        torch.testing.assert_close(lost.square().sum((-1, -2)), expected, rtol=1e-3, atol=1e-4 * float(singular.max()))


def test_score_optimal_cuts_lose_less_of_the_scores_than_stacked_ones(rows: tuple[Tensor, Tensor]) -> None:
    queries, keys = rows
    grams = queries.mT @ queries, keys.mT @ keys
    for rank in range(1, D):
        optimal, stacked = (
            (queries @ (keys - keys @ cut(*pair, rank)).mT).square().sum((-1, -2))
            for pair in (weighted_map(*grams), stacked_map(*grams))
        )
        assert (optimal <= stacked * (1 + 1e-6)).all()
        assert (optimal < 0.9 * stacked).any()


def test_stacked_values_are_their_principal_components(rows: tuple[Tensor, Tensor]) -> None:
    values = rows[0]
    a, b = stacked_map(values.mT @ values)
    torch.testing.assert_close(a, b)
    singular = torch.linalg.svdvals(values)
    for rank in range(D):
        lost = (values - values @ cut(a, b, rank)).square().sum((-1, -2))
        torch.testing.assert_close(lost, singular[..., rank:].square().sum(-1))


def test_neither_side_of_a_stack_counts_for_its_size(rows: tuple[Tensor, Tensor]) -> None:
    queries, keys = rows
    near, far = (stacked_map(scale * queries.mT @ queries, keys.mT @ keys)[0] for scale in (1, 1e6))
    torch.testing.assert_close(near.abs(), far.abs())


def test_directions_that_no_query_ever_took_stay_invertible() -> None:
    weight = torch.diag(torch.tensor([1.0] * (D // 2) + [0.0] * (D // 2)))
    a, b = weighted_map(weight, torch.eye(D))
    assert a.isfinite().all()
    torch.testing.assert_close(b @ a.mT, torch.eye(D, dtype=torch.float64), rtol=0, atol=1e-6)
