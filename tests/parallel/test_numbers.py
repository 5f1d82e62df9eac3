"""Rows of uneven ranks on the wire: as many bytes as numbers kept, and back again."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfold.kv.format import Row, Segment
from kvfold.parallel.numbers import Numbers

KEPT = st.lists(st.integers(0, 12), min_size=1, max_size=5)


@given(KEPT, st.integers(0, 7), st.sampled_from([torch.bfloat16, torch.float32]), st.integers(0, 2**31))
def test_numbers_travel_without_padding(kept: list[int], rows: int, dtype: torch.dtype, seed: int) -> None:
    x = torch.randn(rows, len(kept), 12, generator=torch.Generator().manual_seed(seed)).to(dtype)
    numbers = Numbers(tuple(kept), 12, dtype)
    data = numbers.pack(x)
    assert len(data) == numbers.nbytes(rows) == rows * sum(kept) * dtype.itemsize
    found = numbers.unpack(data, rows)
    for head, count in enumerate(kept):
        assert torch.equal(found[:, head, :count], x[:, head, :count].float())
        assert not found[:, head, count:].any()


@given(KEPT, st.integers(0, 7), st.integers(4, 8), st.floats(1e-20, 1e20), st.integers(0, 2**31))
def test_integers_are_off_by_half_a_step_at_most(kept: list[int], rows: int, bits: int, size: float, seed: int) -> None:
    x = torch.randn(rows, len(kept), 12, generator=torch.Generator().manual_seed(seed)) * size
    numbers = Numbers(tuple(kept), 12, torch.bfloat16, (bits,) * sum(kept))
    data = numbers.pack(x)
    assert len(data) == numbers.nbytes(rows)
    found = numbers.unpack(data, rows)
    for head, count in enumerate(kept):
        own = x[:, head, :count]
        if own.numel():
            step = own.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
            assert ((found[:, head, :count] - own).abs() <= 0.52 * step + 1e-30).all()


ROW = Row((Segment(16, 1), Segment(8, 2), Segment(3, 1)))


def test_integers_are_as_fine_as_what_is_stored() -> None:
    queries, outputs = (make([ROW], 2, 6, torch.float32, 7) for make in (Numbers.queries, Numbers.outputs))
    assert queries.kept == outputs.kept == (4, 4)
    assert queries.bits == outputs.bits == (16, 8, 8, 6) * 2
    assert queries.sizes == (1.0,) * 8
    assert outputs.sizes == (1.0, 127.5, 127.5, 3.5) * 2
    means = torch.tensor([[[0.5, 127.0, -80.0, 3.4, 0.0, 0.0]] * 2])
    found = outputs.unpack(outputs.pack(means), 1)
    assert ((found - means).abs() <= 0.6 * torch.tensor([0, 1.01, 1.01, 3.5 / 31, 0, 0])).all()


def test_as_they_are_they_take_their_dtype() -> None:
    assert Numbers.queries([ROW], 2, 6, torch.float32, 16).nbytes(3) == 3 * 2 * 4 * 4
