"""Packed numbers come back bit for bit, whatever they are, and are shorter where they are like a model's."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kvfold.kv.exponents import MOST_MORE, Bytes, pack, packed_size, unpack

WIDTHS = st.sampled_from([2, 4])


def rows(width: int, count: int = 4000) -> Bytes:
    """Normal numbers of very different channels, as keys have them."""
    found = torch.randn(count, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1.5, 0.5, 32)
    return found.to({2: torch.bfloat16, 4: torch.float32}[width]).view(torch.uint8).numpy().ravel()


@given(width=WIDTHS, data=st.data(), more=st.binary(max_size=9))
def test_anything_comes_back(width: int, data: st.DataObject, more: bytes) -> None:
    """Not a number, infinity, zero and denormal numbers, too; what follows is left alone."""
    bits = {2: np.uint16, 4: np.uint32}[width]
    numbers = data.draw(arrays.arrays(bits, st.integers(0, 200))).view(np.uint8)
    packed = pack(numbers, width)
    assert len(packed) <= len(numbers) + MOST_MORE
    found, end = unpack(np.concatenate([packed, np.frombuffer(more, np.uint8)]), len(numbers), width)
    assert end == len(packed)
    assert np.array_equal(found, numbers)


@pytest.mark.parametrize(("width", "share"), [(2, 0.76), (4, 0.88)])
def test_numbers_like_a_models_are_shorter(width: int, share: float) -> None:
    numbers = rows(width)
    packed = pack(numbers, width)
    assert len(packed) < share * len(numbers)
    assert packed_size(len(numbers), width) <= len(packed) < 1.01 * packed_size(len(numbers), width)
    assert np.array_equal(unpack(packed, len(numbers), width)[0], numbers)


@given(width=WIDTHS, data=st.data())
def test_what_is_no_packed_array_is_refused(width: int, data: st.DataObject) -> None:
    packed = pack(rows(width, 5), width)
    cut = data.draw(st.integers(0, len(packed) - 1))
    with pytest.raises(ValueError, match="packed numbers"):
        unpack(packed[:cut], 160 * width, width)


def test_a_count_that_is_not_the_codes_is_refused() -> None:
    packed = pack(rows(2, 50), 2)
    packed[0] ^= 1
    with pytest.raises(ValueError, match=r"whole exponents|packed numbers"):
        unpack(np.append(packed, np.uint8(0)), 3200, 2)
