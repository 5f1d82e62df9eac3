"""Tiny models and pools of ranks, made once."""

from collections.abc import Callable, Iterator

import pytest

from tests.engine.tiny import Tiny

from .ranks import Ranks


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """`tiny(family)`: the model of that family."""
    made: dict[str, Tiny] = {}

    def get(family: str) -> Tiny:
        if family not in made:
            made[family] = Tiny.make(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


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
