"""The engine's tiny models, and pools of ranks, made once."""

from collections.abc import Iterator

import pytest

from tests.engine.conftest import tiny

from .ranks import Ranks

__all__ = ["alone", "pool", "ranks", "tiny"]


@pytest.fixture(scope="session")
def pool() -> Iterator[list[Ranks]]:
    """The ranks that are running, if any."""
    running: list[Ranks] = []
    yield running
    for each in running:
        each.end()


@pytest.fixture
def ranks(pool: list[Ranks]) -> Ranks:
    """Three ranks, of which tests use two or all; they stay for the next test."""
    if not pool:
        pool.append(Ranks(3))
    return pool[0]


@pytest.fixture
def alone(pool: list[Ranks]) -> None:
    """This process belongs to no ranks."""
    while pool:
        pool.pop().end()
