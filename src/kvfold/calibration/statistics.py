"""From what was captured to what a method needs: maps, quantisers and loss curves of every head."""

import torch
from torch import Tensor

from kvfold.calibration.capture import Capture
from kvfold.calibration.quantisers import fit_quantisers
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
    """The tensors that `zeroc` reads: per map and side a, b [L, G, d, d] and offset, step, loss [L, G, d, widths]."""
    maps = {
        "optimal.key": weighted_map(capture.query.gram, capture.key.covariance),
        "optimal.value": weighted_map(output_gram(decoder), capture.value.covariance),
        "stacked.key": stacked_map(capture.query.gram, capture.key.gram),
        "stacked.value": stacked_map(capture.value.gram),
    }
    gradients = {"key": capture.key_gradient, "value": capture.value_gradient}
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in maps.items():
        side = name.split(".")[1]
        gradient = gradients[side].double() / capture.key.count
        weight = torch.einsum("...ki,...kl,...li->...i", b, gradient, b).float()
        offset, step, error = fit_quantisers(capture.sampled(side) @ a.float())
        fields = {"a": a.float(), "b": b.float(), "offset": offset, "step": step, "loss": error * weight[..., None]}
        tensors |= {f"{name}.{field}": tensor.contiguous() for field, tensor in fields.items()}
    return tensors
