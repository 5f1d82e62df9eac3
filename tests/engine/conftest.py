"""Tiny models, made once."""

from collections.abc import Callable

import pytest

from .tiny import Tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """`tiny(family)`: the model of that family."""
    made: dict[str, Tiny] = {}

    def get(family: str) -> Tiny:
        if family not in made:
            made[family] = Tiny.make(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get
