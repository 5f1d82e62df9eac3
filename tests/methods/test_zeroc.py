from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kvfold.errors import CalibrationError, ConfigError
from kvfold.kv.packing import decode, encode
from kvfold.methods.allocation import WIDTHS
from kvfold.methods.base import AttentionWeights, CacheShape, Prepared
from kvfold.methods.calibrated import FIELDS, SIDES, flat_statistics
from kvfold.methods.dense import Dense
from kvfold.methods.zeroc import BLOCK, ZeroC

SHAPE = CacheShape(layers=2, heads=6, kv_heads=2, head_dim=8, windows=(None, None), rope=True, raw_bits=32)
HIDDEN, TOKENS = 20, 40
GROUP = SHAPE.heads // SHAPE.kv_heads


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def random_statistics(shape: CacheShape, seed: int = 0) -> dict[str, Tensor]:
    """Well-conditioned random maps with random quantisers; nothing in them is symmetric, unit or zero."""
    generator = torch.Generator().manual_seed(seed)
    heads, d = (shape.layers, shape.kv_heads), shape.head_dim
    statistics = {}
    for name in ("optimal", "stacked"):
        for side in SIDES:
            a = torch.eye(d) + 0.2 * torch.randn(*heads, d, d, generator=generator)
            offset = torch.randn(*heads, d, len(WIDTHS), generator=generator)
            step = torch.rand(*heads, d, len(WIDTHS), generator=generator) + 0.5
            error = torch.rand(*heads, d, 1, generator=generator) * torch.tensor([4.0**-bits for bits in WIDTHS])
            error[..., -1] = 0
            weight = 3 * torch.randn(*heads, d, generator=generator)
            values = (a, torch.linalg.inv(a).mT, offset, step, error, weight.exp())
            statistics |= {f"{name}.{side}.{field}": x for field, x in zip(FIELDS, values, strict=True)}
    return statistics


def random_weights(shape: CacheShape, biases: bool, seed: int = 1) -> AttentionWeights:
    generator = torch.Generator().manual_seed(seed)
    rows = (shape.heads + 2 * shape.kv_heads) * shape.head_dim

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator) / 3

    return AttentionWeights(
        random(rows, HIDDEN),
        random(rows) if biases else None,
        random(HIDDEN, shape.heads * shape.head_dim),
        random(HIDDEN) if biases else None,
    )


def rotated(x: Tensor) -> Tensor:
    """x [T, heads, d] with position t's pairs of dimensions turned by angles proportional to t."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[0])[:, None, None] * 0.7 ** torch.arange(half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)


def projected(shape: CacheShape, weights: AttentionWeights, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [T, H, d], keys and values [T, G, d] of inputs x [T, HIDDEN] as attention meets them."""
    qkv = torch.nn.functional.linear(x, weights.qkv, weights.qkv_bias).unflatten(1, (-1, shape.head_dim))
    q, k, v = qkv.split([shape.heads, shape.kv_heads, shape.kv_heads], 1)
    if shape.rope:
        q, k = rotated(q), rotated(k)
    if weights.query_map is not None:
        assert weights.key_map is not None
        assert weights.key_shift is not None
        per_query = weights.query_map.repeat_interleave(shape.heads // shape.kv_heads, 0)
        q = torch.einsum("thd,hde->the", q, per_query)
        k = torch.einsum("tgd,gde->tge", k, weights.key_map) + weights.key_shift
    return q, k, v


def attention(shape: CacheShape, weights: AttentionWeights, x: Tensor) -> Tensor:
    """One layer's attention on inputs x, output projection included, [T, HIDDEN]."""
    q, k, v = projected(shape, weights, x)
    k, v = (y.repeat_interleave(shape.heads // shape.kv_heads, 1) for y in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) * 0.3
    scores.masked_fill_(torch.ones(len(x), len(x), dtype=torch.bool).triu(1), float("-inf"))
    heads = torch.einsum("hts,shd->thd", scores.softmax(-1), v).flatten(1)
    return torch.nn.functional.linear(heads, weights.out, weights.out_bias)


def prepare(codec: ZeroC, shape: CacheShape = SHAPE) -> Prepared:
    return codec.prepare(shape, random_statistics(shape))


def folded(prepared: Prepared, layer: int, weights: AttentionWeights) -> AttentionWeights:
    assert prepared.transform is not None
    return prepared.transform(layer, weights)


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("codec", [ZeroC(rank=8), ZeroC(rank=8, map="stacked"), ZeroC(bits=4), ZeroC(bits=16)])
def test_folding_alone_changes_no_output(codec: ZeroC, biases: bool, rope: bool) -> None:
    shape = replace(SHAPE, rope=rope)
    weights, x = random_weights(shape, biases), torch.randn(TOKENS, HIDDEN)
    prepared = prepare(codec, shape)
    for layer in range(shape.layers):
        new = folded(prepared, layer, weights)
        assert (new.query_map is not None) == rope
        torch.testing.assert_close(attention(shape, new, x), attention(shape, weights, x), rtol=1e-4, atol=1e-4)


def test_the_given_weights_stay_as_they_are() -> None:
    weights, untouched = random_weights(SHAPE, True), random_weights(SHAPE, True)
    folded(prepare(ZeroC(bits=3)), 0, weights)
    for name in ("qkv", "qkv_bias", "out", "out_bias"):
        assert torch.equal(getattr(weights, name), getattr(untouched, name))


@pytest.mark.parametrize("rope", [True, False])
def test_rows_arrive_in_code_units(rope: bool) -> None:
    """What pages read back is each dimension of the calibrated basis through its own quantiser."""
    shape = replace(SHAPE, rope=rope)
    statistics, weights = random_statistics(shape), random_weights(shape, True)
    prepared = prepare(ZeroC(bits=3), shape)
    x = torch.randn(BLOCK, HIDDEN)
    for layer in range(shape.layers):
        plain, coded = (projected(shape, w, x) for w in (weights, folded(prepared, layer, weights)))
        for head in range(shape.kv_heads):
            fmt = prepared.layout.far[layer][head]
            decoded = decode(fmt, encode(fmt, coded[1][None, None, :, head], coded[2][None, None, :, head]))
            for side, row, got, rows in zip(SIDES, (fmt.key, fmt.value), decoded, plain[1:], strict=True):
                a, offset, step = (statistics[f"optimal.{side}.{f}"][layer, head] for f in ("a", "offset", "step"))
                basis = rows[:, head] @ a
                # Which dimension is which is the allocation's business: find each by what it reads back as.
                wanted = {}
                for dim in range(shape.head_dim):
                    for bits in set(row.widths):
                        o, s = offset[dim, WIDTHS.index(bits)], step[dim, WIDTHS.index(bits)]
                        top = (2**bits - 1) / 2
                        units = (basis[:, dim] - o) / s
                        wanted[dim, bits] = units if bits == 16 else (units + top).round().clamp(0, 2 * top) - top
                used = set()
                for place, bits in enumerate(row.widths):
                    off = {key: float((x - got[0, place]).abs().mean()) for key, x in wanted.items() if key[1] == bits}
                    best = min(off, key=lambda key: off[key])
                    assert off[best] < 0.1  # a code on the border of two may fall to either side
                    used.add(best[0])
                assert len(used) == row.kept


def test_sealed_rows_cost_what_was_asked_for() -> None:
    dense = Dense().prepare(replace(SHAPE, raw_bits=16), None).layout
    for bits in (2, 3, 4, 6):
        layout = prepare(ZeroC(bits=bits)).layout
        assert 0.9 * bits <= layout.code_bits <= bits
        assert np.mean(dense.capacity / layout.capacity) == pytest.approx(layout.code_bits / 16, rel=0.15)


def test_flat_statistics_treat_all_heads_alike() -> None:
    shape = CacheShape(2, 6, 2, 64, (None, None), rope=True)
    prepared = ZeroC(bits=4).prepare(shape, flat_statistics(shape))
    assert len({fmt for layer in prepared.layout.far for fmt in layer}) == 1
    assert (prepared.layout.capacity >= 4 * Dense().prepare(shape, None).layout.capacity).all()


def test_sinks_and_recent_tokens_stay_near() -> None:
    layout = prepare(ZeroC(bits=4, sinks=3, recent=40)).layout
    assert (layout.sinks, layout.recent) == (3, 40)
    assert layout.sealed(3 + 40 + BLOCK - 1) == 3
    assert layout.sealed(3 + 40 + BLOCK) == 3 + BLOCK


def test_ranks_keep_leading_dimensions_unrounded() -> None:
    layout = prepare(ZeroC(rank=5)).layout
    fmt = layout.far[0][0]
    assert fmt.key.raw == fmt.key.kept == fmt.value.kept == 5
    assert fmt.key.raw_bits == SHAPE.raw_bits


def test_rank_cuts_the_least_important_dimensions() -> None:
    """Dimensions come most important first: the first `rank` of the basis are what is left."""
    shape = replace(SHAPE, rope=False)
    statistics, weights = random_statistics(shape), random_weights(shape, False)
    x = torch.randn(5, HIDDEN)
    values = projected(shape, weights, x)[2]
    cut = projected(shape, folded(prepare(ZeroC(rank=3), shape), 1, weights), x)[2]
    for head in range(shape.kv_heads):
        a, _, offset, step, _, _ = (statistics[f"optimal.value.{f}"][1, head] for f in FIELDS)
        whole = ((values[:, head] @ a - offset[:, -1]) / step[:, -1])[:, :3]
        torch.testing.assert_close(cut[:, head, :3], whole, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_prepared_is_refused() -> None:
    with pytest.raises(CalibrationError, match="kvfold calibrate"):
        ZeroC().prepare(SHAPE, None)
    with pytest.raises(ConfigError, match="at most 8"):
        prepare(ZeroC(rank=9))
    with pytest.raises(ConfigError, match="max_loss"):
        prepare(ZeroC(max_loss=0.01))
