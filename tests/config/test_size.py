"""Sizes in bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.config.size import format_bytes, parse_bytes
from kvfold.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1GiB", 2**30),
        ("512MiB", 512 * 2**20),
        ("1.5GB", 1_500_000_000),
        ("1.5 gb", 1_500_000_000),
        ("2G", 2 * 2**30),
        ("3kib", 3072),
        ("0.5T", 2**39),
        ("17", 17),
        ("17B", 17),
        (" 1.5KiB ", 1536),
        (4096, 4096),
    ],
)
def test_parses(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "1 GiX", "1i", "1iB", "-1GiB", "1e9", "nan", "1,5GB", "0", "0.4", 0, -5, True, 1.5, None],
)
def test_rejects_with_a_remedy(text: object) -> None:
    with pytest.raises(ConfigError, match="write a size such as '1GiB'"):
        parse_bytes(text)  # type: ignore[arg-type]


def test_rejects_more_digits_than_python_converts() -> None:
    with pytest.raises(ConfigError, match="not a size"):
        parse_bytes("9" * 10_000)


@given(st.integers(min_value=1, max_value=2**62))
def test_whole_numbers_are_exact(size: int) -> None:
    assert parse_bytes(str(size)) == parse_bytes(size) == parse_bytes(f"{size}B") == size


@given(st.integers(min_value=1, max_value=10**14))
def test_formatted_sizes_parse_back_within_their_three_digits(size: int) -> None:
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.006)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.98 KiB"),
        (1536, "1.50 KiB"),
        (2**30 - 1, "1.00 GiB"),
        (150 * 2**20, "150 MiB"),
    ],
)
def test_formats(size: int, text: str) -> None:
    assert format_bytes(size) == text
