"""One compression method made ready for one model: what an engine serves requests with."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from kvfold.kv.layout import CacheLayout
from kvfold.methods.base import AttentionWeights, CacheShape, Codec
from kvfold.model.decoder import Decoder
from kvfold.model.spec import ModelSpec


@dataclass(frozen=True)
class MethodLane:
    """A codec with its layout of the cache and the attention weights it folded; `label` is how users call it."""

    label: str
    codec: Codec
    layout: CacheLayout
    weights: list[AttentionWeights]


def cache_shape(spec: ModelSpec, raw_bits: int) -> CacheShape:
    """What methods may know of a model; raw_bits: width of uncompressed elements, 16 or 32."""
    windows = tuple(layer.window for layer in spec.layer_specs)
    return CacheShape(spec.n_layers, spec.heads, spec.kv_heads, spec.head_dim, windows, spec.rope, raw_bits)


def build_lane(
    decoder: Decoder, label: str, codec: Codec, raw_bits: int, statistics: Mapping[str, Tensor] | None = None
) -> MethodLane:
    """Prepares a codec for a model. statistics: the calibration's tensors, for codecs that need it."""
    prepared = codec.prepare(cache_shape(decoder.spec, raw_bits), statistics)
    weights = list(decoder.attention_weights)
    if prepared.transform is not None:
        weights = [prepared.transform(layer, w) for layer, w in enumerate(weights)]
    return MethodLane(label, codec, prepared.layout, weights)
