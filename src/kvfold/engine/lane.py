"""One compression method made ready for one model: what an engine serves requests with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b

from torch import Tensor

from kvfold.errors import PromptError
from kvfold.kv.frame import Basis
from kvfold.kv.layout import CacheLayout
from kvfold.kv.staged import StagedLayout
from kvfold.kv.wire import Identity
from kvfold.methods.base import CacheShape
from kvfold.methods.method import Method
from kvfold.methods.staging import Staging
from kvfold.model.decoder import Decoder
from kvfold.model.linear import Projections
from kvfold.model.packed import pack_projections
from kvfold.model.spec import ModelSpec


@dataclass(frozen=True)
class MethodLane:
    """A method with its layout of the cache and the attention weights it folded; `label` is how users call it.

    staging: what happens at the events of a staged layout; None where the layout is not staged. model, calibration:
    fingerprint and checksum of what the lane was made from, empty where nobody said.
    """

    label: str
    method: Method
    layout: CacheLayout | StagedLayout
    weights: Sequence[Projections]
    staging: Staging | None = None
    model: str = ""
    calibration: str = ""

    @cached_property
    def identity(self) -> Identity:
        """What pages of this lane mean, for other workers."""
        method, layout = (blake2b(repr(x).encode(), digest_size=16).hexdigest() for x in (self.method, self.layout))
        return Identity(self.model, method, self.calibration, layout)

    def context(self, length: int, marked: int | None) -> int:
        """How many of a prompt's `length` tokens are read before the first event after the context.

        marked: where the prompt says that its context ends. Raises PromptError where it should say so.
        """
        if self.method.compress == "prompt":
            return length
        if marked is None:
            raise PromptError(
                f"{self.label} compresses a context before the question is read, and this prompt marks none; "
                'give the context apart ({"context": ..., "prompt": ...}, --context-file) or use compress="prompt"'
            )
        if not 0 < marked <= length:
            raise PromptError(f"context={marked} is out of range; give 1 to the prompt's {length} tokens")
        return marked

    @property
    def shared_bases(self) -> Sequence[Basis]:
        """Coordinates of coded rows that all sequences of the lane have in common, one for each class."""
        encoder = None if self.staging is None else self.staging.encoder
        return () if encoder is None else encoder.shared


def cache_shape(spec: ModelSpec, raw_bits: int) -> CacheShape:
    """What methods may know of a model; raw_bits: width of uncompressed elements, 16 or 32."""
    windows = tuple(layer.window for layer in spec.layer_specs)
    frequencies = tuple(None if layer.rope is None else layer.rope.inv_freq for layer in spec.layer_specs)
    sizes = (spec.n_layers, spec.heads, spec.kv_heads, spec.head_dim)
    return CacheShape(*sizes, windows, spec.rope, raw_bits, frequencies)


def build_lane(
    decoder: Decoder, label: str, method: Method, raw_bits: int, statistics: Mapping[str, Tensor] | None = None
) -> MethodLane:
    """Prepares a method for a model. statistics: the calibration's tensors, for methods that need it."""
    ready = method.prepare(cache_shape(decoder.spec, raw_bits), statistics)
    weights = decoder.projections
    if ready.transform is not None:
        weights = [Projections.of(ready.transform(layer, w)) for layer, w in enumerate(decoder.attention_weights)]
    return MethodLane(label, method, ready.layout, weights, ready.staging)


def pack_lanes(decoder: Decoder, lanes: Sequence[MethodLane], bits: int | None) -> list[MethodLane]:
    """Packs the weights of a decoder and of its lanes, once all lanes are there: for inference only from then on.

    bits: as in `PackedLinear`; None leaves everything as it is. Raises KernelsUnavailable.
    """
    if bits is None:
        return list(lanes)
    shared = decoder.projections
    decoder.pack(bits)
    return [
        replace(lane, weights=decoder.projections if lane.weights is shared else pack_projections(lane.weights, bits))
        for lane in lanes
    ]
