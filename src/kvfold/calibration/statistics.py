"""From what was captured to what a method needs: maps, quantisers and loss curves of every head."""

import torch
from torch import Tensor

from kvfold.calibration.capture import Capture
from kvfold.calibration.quantisers import fit_quantisers, stretched
from kvfold.methods.calibrated import FIELDS, SIDES
from kvfold.methods.maps import stacked_map, weighted_map
from kvfold.model.decoder import Decoder


def output_gram(decoder: Decoder) -> Tensor:
    """Per KV head the sum over its query heads of W_O,h^T W_O,h (rows are outputs), float64 [L, G, d, d]."""
    spec = decoder.spec
    grams = []
    for weights in decoder.attention_weights:
        out = weights.out.double().unflatten(1, (spec.kv_heads, spec.group, spec.head_dim))
        grams.append(torch.einsum("ojgd,ojge->jde", out, out))
    return torch.stack(grams)


def zeroc_statistics(decoder: Decoder, capture: Capture) -> dict[str, Tensor]:
    """The tensors that `zeroc` reads: per map and side a, b [L, G, d, d], offset, step, error
    [L, G, d, widths] and weight [L, G, d]."""
    key, value = capture.moments["key"], capture.moments["value"]
    maps = {
        "optimal.key": weighted_map(capture.query.gram, key.covariance),
        "optimal.value": weighted_map(output_gram(decoder), value.covariance),
        "stacked.key": stacked_map(capture.query.gram, key.gram),
        "stacked.value": stacked_map(value.gram),
    }
    samples = {side: stretched(capture.sampled(side)) for side in SIDES}
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in maps.items():
        side = name.split(".")[1]
        weight = torch.einsum("...ki,...kl,...li->...i", b, capture.gradients[side].double(), b).float()
        # Layer by layer, so that the many passes over the samples stay in the processor's cache.
        fitted = [fit_quantisers(x @ m) for x, m in zip(samples[side], a.float(), strict=True)]
        offset, step, error = (torch.stack(part) for part in zip(*fitted, strict=True))
        values = (a.float(), b.float(), offset, step, error, weight)
        tensors |= {f"{name}.{field}": x.contiguous() for field, x in zip(FIELDS, values, strict=True)}
    return tensors
