"""Lanes, maps and gradients of the decoder."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfold.model.decoder import Decoder, Lane
from kvfold.model.linear import Projections
from kvfold.model.loading import load_model


@pytest.fixture
def decoder(tiny_llama: Any) -> Decoder:
    return load_model(tiny_llama[0], dtype=torch.float32).decoder


def folded(decoder: Decoder, **maps: Tensor) -> list[Projections]:
    return [replace(weights, **maps) for weights in decoder.projections]


def random_map(decoder: Decoder) -> Tensor:
    """A random well-conditioned matrix per KV head, [G, d, d]."""
    spec = decoder.spec
    noise = torch.randn(spec.kv_heads, spec.head_dim, spec.head_dim, generator=torch.Generator().manual_seed(3))
    return torch.eye(spec.head_dim) + 0.1 * noise


def test_two_lanes_equal_two_forwards(
    decoder: Decoder, token_ids: Tensor, run: Callable[..., Tensor], attend_for: Callable[..., Any]
) -> None:
    parts = token_ids[:15], token_ids[15:]
    maps = random_map(decoder)
    weights = decoder.projections, folded(decoder, query_map=maps, key_map=maps)
    attend = attend_for(decoder.spec)
    lanes = [Lane(slice(0, 15), weights[0], attend), Lane(slice(15, 40), weights[1], attend)]
    positions = torch.cat([torch.arange(15), torch.arange(25)])
    together = decoder.logits(decoder.forward(token_ids, positions, lanes))
    apart = [run(decoder, ids, weights=own) for ids, own in zip(parts, weights, strict=True)]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-4)


def test_positions_are_logical(
    decoder: Decoder, token_ids: Tensor, attend_for: Callable[..., Any], run: Callable[..., Tensor]
) -> None:
    """RoPE sees only differences of positions, so shifting all of them changes nothing; stretching does."""
    lanes = [Lane(slice(0, 40), decoder.projections, attend_for(decoder.spec))]
    expected = run(decoder, token_ids)
    shifted = decoder.logits(decoder.forward(token_ids, torch.arange(40) + 20, lanes))
    stretched = decoder.logits(decoder.forward(token_ids, torch.arange(40) * 2, lanes))
    torch.testing.assert_close(shifted, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(stretched, expected, atol=1e-2)


def test_inverse_maps_leave_the_model_unchanged(
    decoder: Decoder, token_ids: Tensor, run: Callable[..., Tensor]
) -> None:
    """q M . k M^-T = q . k for every query of a group."""
    maps = random_map(decoder)
    weights = folded(decoder, query_map=maps, key_map=torch.linalg.inv(maps).mT.contiguous())
    torch.testing.assert_close(run(decoder, token_ids, weights=weights), run(decoder, token_ids))


def test_maps_act_per_kv_head(
    decoder: Decoder, token_ids: Tensor, run: Callable[..., Tensor], attend_for: Callable[..., Any]
) -> None:
    maps = random_map(decoder)
    shift = torch.randn(decoder.spec.kv_heads, decoder.spec.head_dim)
    attend, seen = attend_for(decoder.spec), []

    def record(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer == 0:
            seen.append((q, k, v))
        return attend(layer, q, k, v)

    run(decoder, token_ids, attend=record)
    run(
        decoder,
        token_ids,
        attend=record,
        weights=folded(decoder, query_map=maps, key_map=2 * maps, key_shift=shift),
    )
    (q, k, v), (mapped_q, mapped_k, same_v) = seen
    for head in range(decoder.spec.heads):
        torch.testing.assert_close(mapped_q[:, head], q[:, head] @ maps[head // decoder.spec.group])
    for head in range(decoder.spec.kv_heads):
        torch.testing.assert_close(mapped_k[:, head], 2 * k[:, head] @ maps[head] + shift[head])
    assert torch.equal(v, same_v)


def test_softmax_ignores_a_key_shift(decoder: Decoder, token_ids: Tensor, run: Callable[..., Tensor]) -> None:
    shift = torch.randn(decoder.spec.kv_heads, decoder.spec.head_dim)
    shifted = run(decoder, token_ids, weights=folded(decoder, key_shift=shift))
    torch.testing.assert_close(shifted, run(decoder, token_ids), rtol=1e-4, atol=1e-4)


def test_gradients_reach_values_of_every_layer(
    decoder: Decoder, token_ids: Tensor, run: Callable[..., Tensor], attend_for: Callable[..., Any]
) -> None:
    """The gradient with respect to a value offset predicts the change of the loss."""
    attend = attend_for(decoder.spec)
    shape = (decoder.spec.n_layers, decoder.spec.kv_heads, decoder.spec.head_dim)

    def loss(offset: Tensor) -> Tensor:
        def shifted(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(layer, q, k, v + offset[layer])

        return run(decoder, token_ids, attend=shifted).log_softmax(-1)[:, 0].mean()

    offset = torch.zeros(shape, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(offset), offset)
    assert all(gradient[layer].abs().max() > 0 for layer in range(shape[0]))
    step = 3e-2 * gradient / gradient.norm()
    with torch.no_grad():
        change = (loss(step) - loss(-step)) / 2
    torch.testing.assert_close(change, (gradient * step).sum(), rtol=2e-2, atol=1e-4)
    assert not any(weights.qkv.requires_grad for weights in decoder.attention_weights)


@pytest.mark.parametrize("slices", [[slice(0, 39)], [slice(1, 40)], [slice(0, 20), slice(21, 40)], []])
def test_lanes_must_cover_the_batch(
    slices: list[slice], decoder: Decoder, token_ids: Tensor, attend_for: Callable[..., Any]
) -> None:
    lanes = [Lane(tokens, decoder.projections, attend_for(decoder.spec)) for tokens in slices]
    with pytest.raises(ValueError, match="lane"):
        decoder.forward(token_ids, torch.arange(40), lanes)
