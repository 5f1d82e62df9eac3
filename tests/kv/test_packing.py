import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.kv.format import PageFormat, Row, Scale, Segment, raw_format, unit_tokens
from kvfold.kv.packing import decode, encode, read_codes, read_scales, take_tokens
from tests.kv.formats import formats


def rows_like(
    fmt: PageFormat, lead: tuple[int, ...], seed: int, spread: float = 3.0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (*lead, fmt.block, fmt.head_dim)
    return tuple(spread * torch.randn(shape, generator=generator) for _ in range(2))  # type: ignore[return-value]


def naive_row(row: Row, x: np.ndarray) -> np.ndarray:
    """What one block [block, d] reads back as, written from the format's description, number by number."""
    block = len(x)
    out = np.zeros((block, row.kept))
    for i, bits in enumerate(row.widths):
        for t in range(block):
            value = np.float32(x[t, i])
            if bits == 32:
                out[t, i] = value
            elif bits == 16:
                out[t, i] = torch.tensor(value).bfloat16().float().item()
            elif row.scale is Scale.STATIC:
                middle = (2**bits - 1) / 2
                out[t, i] = np.clip(np.round(value + middle), 0, 2**bits - 1) - middle
            elif row.scale is Scale.STEP:
                exact = max(2 * abs(x[t, j]) / (2**w - 1) for j, w in enumerate(row.widths))
                step = 2 ** (np.clip(np.ceil(12 * np.log2(np.float32(exact))), -128, 127) / 12)
                middle = (2**bits - 1) / 2
                out[t, i] = (np.clip(np.round(value / np.float32(step) + middle), 0, 2**bits - 1) - middle) * step
            else:
                if row.scale is Scale.CHANNEL:
                    shared, levels = x[:, i], 2**bits - 1
                else:
                    size = row.group or row.kept
                    first = i - i % size
                    shared, levels = x[t, first : first + size], 2 ** max(row.widths[first : first + size]) - 1
                low = np.float16(shared.min())
                step = np.float16((shared.max() - shared.min()) / levels)
                code = np.clip(np.round((value - np.float32(low)) / max(np.float32(step), 1e-12)), 0, 2**bits - 1)
                out[t, i] = code * np.float32(step) + np.float32(low)
    return out


@settings(max_examples=60, deadline=None)
@given(formats(), st.integers(0, 2**16))
def test_blocks_read_back_as_the_format_says(fmt: PageFormat, seed: int) -> None:
    key, value = rows_like(fmt, (2, 3), seed)
    blocks = encode(fmt, key, value)
    assert blocks.shape == (2, 3, fmt.block_bytes)
    for row, x, got in zip((fmt.key, fmt.value), (key, value), decode(fmt, blocks), strict=True):
        for n in range(2):
            expected = np.concatenate([naive_row(row, x[n, b].numpy()) for b in range(3)])
            np.testing.assert_allclose(
                got[n].T.numpy(), expected, rtol=1e-5, atol=2e-3 if row.scale != "static" else 1e-6
            )


@settings(max_examples=60, deadline=None)
@given(formats(), st.integers(0, 2**16))
def test_encoding_what_was_decoded_changes_nothing(fmt: PageFormat, seed: int) -> None:
    if Scale.STATIC not in (fmt.key.scale, fmt.value.scale) or fmt.key.scale != fmt.value.scale:
        return  # scales are taken anew from what they rounded
    blocks = encode(fmt, *rows_like(fmt, (1, 2), seed))
    padded = [torch.zeros(1, 2, fmt.block, fmt.head_dim) for _ in range(2)]
    for x, rows in zip(padded, decode(fmt, blocks), strict=True):
        x[..., : rows.shape[1]] = rows.view(1, rows.shape[1], 2, fmt.block).permute(0, 2, 3, 1)
    assert torch.equal(encode(fmt, *padded), blocks)


@settings(max_examples=60, deadline=None)
@given(formats(), st.integers(0, 2**16), st.data())
def test_tokens_taken_from_blocks_are_bit_for_bit_what_they_were(
    fmt: PageFormat, seed: int, data: st.DataObject
) -> None:
    blocks = encode(fmt, *rows_like(fmt, (5,), seed))
    kept = data.draw(st.integers(0, 5))
    if fmt.whole_blocks:
        chosen = torch.tensor(data.draw(st.permutations(range(5)))[:kept], dtype=torch.int64)
        tokens = (chosen[:, None] * fmt.block + torch.arange(fmt.block)).flatten()
    else:
        tokens = torch.randperm(5 * fmt.block, generator=torch.Generator().manual_seed(seed))[: kept * fmt.block]
    taken = take_tokens(fmt, blocks, tokens)
    assert taken.shape == (kept, fmt.block_bytes)
    for before, after in zip(decode(fmt, blocks[None]), decode(fmt, taken[None]), strict=True):
        assert torch.equal(before[..., tokens], after)


@settings(max_examples=60, deadline=None)
@given(formats(), st.integers(0, 2**16))
def test_sums_are_those_of_the_codes(fmt: PageFormat, seed: int) -> None:
    blocks = encode(fmt, *rows_like(fmt, (1, 3), seed))
    for row, data in ((fmt.key, blocks[..., : fmt.key_bytes]), (fmt.value, blocks[..., fmt.key_bytes :])):
        if not row.sums:
            continue
        codes = read_codes(row, fmt.block, data).long()  # [1, dims, B, block]
        low, _, sums = read_scales(row, fmt.block, data)
        assert sums is not None
        for g in range(low.shape[1]):
            size = codes.shape[1] // low.shape[1]
            group = codes[:, g * size : (g + 1) * size]
            expected = group.sum(1) if row.scale is Scale.TOKEN else group.sum((1, 3))[..., None]
            assert torch.equal(sums[:, g, 0, :, :, 0].long(), expected)


@settings(max_examples=60, deadline=None)
@given(formats(), st.integers(0, 2**16))
def test_a_code_lies_where_the_format_says(fmt: PageFormat, seed: int) -> None:
    block = encode(fmt, *rows_like(fmt, (), seed))
    unit = unit_tokens(fmt.block)
    for row, data in ((fmt.key, block[: fmt.key_bytes]), (fmt.value, block[fmt.key_bytes :])):
        codes = read_codes(row, fmt.block, data[None, None])[0, :, 0]
        stream = int.from_bytes(data.numpy().tobytes(), "little")
        start = 0
        for first in range(0, fmt.block, unit):
            for dim, bits in enumerate(row.widths):
                for token in range(unit):
                    if bits <= 8:
                        assert int(codes[dim - row.raw, first + token]) == stream >> start & (1 << bits) - 1
                    start += bits
        assert start == 8 * (row.nbytes(fmt.block) - row.scale_bytes * row.scale_count(fmt.block))


def test_capacity_counts_whole_blocks() -> None:
    fmt = PageFormat(8192, 64, 16, Row((Segment(4, 64),)), Row((Segment(4, 60),)))
    assert fmt.block_bytes == 16 * 124 // 2
    assert fmt.capacity == 16 * (8192 // fmt.block_bytes)
    assert raw_format(8192, 64).capacity == 32


def test_outliers_infinities_and_nan_are_codes() -> None:
    fmt = PageFormat(4096, 4, 16, Row((Segment(3, 4),)), Row((Segment(8, 4),)))
    bad = torch.tensor([float("inf"), float("-inf"), float("nan"), 1e30]).expand(1, 1, 16, 4)
    key, value = decode(fmt, encode(fmt, bad, bad))
    assert key.isfinite().all()
    assert value.isfinite().all()
    assert key[0, 0].unique().tolist() == [3.5]
    assert key[0, 1].unique().tolist() == [-3.5]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Segment(7 + 2, 4),
        lambda: Segment(4, 0),
        lambda: Row((Segment(4, 2), Segment(16, 2))),
        lambda: Row((Segment(16, 2),), Scale.TOKEN),
        lambda: Row((Segment(4, 6),), Scale.TOKEN, group=4),
        lambda: PageFormat(64, 4, 1, Row((Segment(4, 4),)), Row(())),
        lambda: PageFormat(64, 4, 16, Row((Segment(8, 5),)), Row(())),
        lambda: PageFormat(8, 4, 16, Row((Segment(8, 4),)), Row(())),
    ],
)
def test_impossible_formats_are_refused(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r".+"):
        make()
