"""The reference backend against a version that walks token by token and knows nothing of pages."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvfold.attention.reference import ReferenceBackend
from kvfold.kv.access import round_trip
from kvfold.kv.format import PageFormat, Row, Scale, Segment, raw_format
from kvfold.kv.layout import CacheLayout
from kvfold.kv.packing import decode, encode
from tests.attention.stepping import cut, random_inputs, stepped

D, G, H = 8, 2, 6
PAGE = 1024


def coded(block: int, key: Row, value: Row) -> PageFormat:
    return PageFormat(PAGE, D, block, key, value)


FORMATS = {
    "static": [
        coded(16, Row((Segment(6, 2), Segment(3, 3))), Row((Segment(8, 1), Segment(1, 4)))),
        coded(16, Row((Segment(16, 2), Segment(5, 3))), Row((Segment(2, 8),))),
    ],
    "token": [coded(1, Row((Segment(8, 8),), Scale.TOKEN), Row((Segment(8, 8),), Scale.TOKEN, 4))] * 2,
    "kivi": [coded(32, Row((Segment(2, 8),), Scale.CHANNEL), Row((Segment(4, 8),), Scale.TOKEN, 4))] * 2,
    "truncated": [coded(1, Row((Segment(16, 5),)), Row((Segment(16, 3),)))] * 2,
}


def layout_of(kind: str, windows: tuple[int | None, ...]) -> CacheLayout:
    near = raw_format(PAGE, D)
    if kind == "dense":
        return CacheLayout(((near,) * G,) * len(windows), near, 0, 0, windows, exact=True)
    heads = FORMATS[kind]
    if kind != "kivi":  # whole pages of whole seal units
        seal = heads[0].block
        assert all(f.capacity % seal == 0 for f in heads)
    return CacheLayout((tuple(heads),) * len(windows), near, 3, 20, windows)


def naive(layout: CacheLayout, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One whole sequence, query by query: q [T, H, D], k and v [T, G, D]."""
    count = len(q)
    near_k, near_v = round_trip(layout.near, k, v)
    out, lse = torch.zeros(count, H, D), torch.zeros(count, H)
    window = layout.windows[layer]
    for g in range(G):
        fmt = layout.far[layer][g]
        far_k, far_v = near_k[:, g].clone(), near_v[:, g].clone()
        for row in range(0, layout.far_tokens(count) if not layout.exact else 0, fmt.block):
            at = slice(layout.sinks + row, layout.sinks + row + fmt.block)
            rows = decode(fmt, encode(fmt, near_k[None, None, at, g], near_v[None, None, at, g]))
            for target, kept in ((far_k, rows[0]), (far_v, rows[1])):
                target[at] = 0
                target[at, : kept.shape[1]] = kept[0].T
        for t in range(count):
            first = 0 if window is None else max(0, t - window + 1)
            position = torch.arange(first, t + 1)
            sealed = (position >= layout.sinks) & (position < layout.sealed(t + 1)) & (not layout.exact)
            keys = torch.where(sealed[:, None], far_k[first : t + 1], near_k[first : t + 1, g])
            values = torch.where(sealed[:, None], far_v[first : t + 1], near_v[first : t + 1, g])
            heads = slice(g * H // G, (g + 1) * H // G)
            scores = q[t, heads] @ keys.T * scale
            out[t, heads] = scores.softmax(-1) @ values
            lse[t, heads] = scores.logsumexp(-1)
    return out, lse


@pytest.mark.parametrize("kind", ["dense", *FORMATS])
@pytest.mark.parametrize("windows", [(None,), (9, None), (40,)])
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_attention_equals_the_token_by_token_version(
    kind: str, windows: tuple[int | None, ...], data: st.DataObject
) -> None:
    layout = layout_of(kind, windows)
    lengths = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=3), label="lengths")
    cuts = [cut(n, data.draw(st.lists(st.sampled_from([1, 1, 2, 7, 30, 64]), min_size=1, max_size=5))) for n in lengths]
    inputs = random_inputs(lengths, len(windows), H, G, D, data.draw(st.integers(0, 99)))
    got = stepped(ReferenceBackend(), layout, inputs, cuts, 0.3)
    for sequence, layers in zip(got, inputs, strict=True):
        for layer, (out, lse) in enumerate(sequence):
            expected_out, expected_lse = naive(layout, layer, *layers[layer], 0.3)
            np.testing.assert_allclose(out, expected_out, rtol=2e-4, atol=2e-4)
            np.testing.assert_allclose(lse, expected_lse, rtol=2e-4, atol=2e-4)


def test_tiles_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, inputs = layout_of("static", (None,)), random_inputs([120], 1, H, G, D, 0)
    whole = stepped(ReferenceBackend(), layout, inputs, [[120]], 0.3)
    monkeypatch.setattr("kvfold.attention.reference.MAX_SCORES", 1000)
    torch.testing.assert_close(stepped(ReferenceBackend(), layout, inputs, [[120]], 0.3)[0][0][0], whole[0][0][0])
