"""The nearest name in error messages."""

import pytest

from kvfold.config.suggest import suggest


@pytest.mark.parametrize(
    ("name", "tail"),
    [("zeroC", "; did you mean 'zeroc'?"), ("zerok", "; did you mean 'zeroc'?"), ("h2o", ""), ("", "")],
)
def test_names_the_nearest_or_nothing(name: str, tail: str) -> None:
    assert suggest(name, ["none", "zeroc"]) == tail


def test_no_options_no_suggestion() -> None:
    assert suggest("zeroc", []) == ""
