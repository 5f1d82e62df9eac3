"""ZipCache (arXiv 2405.14256): salient tokens in more bits, saliency being normalised attention."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvfold.errors import ConfigError
from kvfold.kv.format import PageFormat, Row, Scale, Segment
from kvfold.kv.frame import Basis, Scaled
from kvfold.methods.base import CacheShape, Encoder, Facts, Prepared
from kvfold.methods.held import HeldRows
from kvfold.methods.quantiser import check_near
from kvfold.methods.saliency import WATCHES, by_saliency

ENOUGH = 128  # tokens to take ranges from


@dataclass(frozen=True, kw_only=True)
class ZipCache:
    """`zipcache(hi=4, lo=2, salient=0.6)`: the most salient share of each head's tokens in `hi` bits, the others in
    `lo`. Saliency: attention from probe queries (the prompt's last 5 % and a random 5 %) over the number of probes
    that could see the token. Values: channel-separable tokenwise, divided by c_i = sqrt(max |x_i|) per channel
    (16 bits each, once per sequence), then one scale per token. Keys: per channel and class of precision.

    Generated tokens are coded every `every` tokens, with the saliency that they showed since.
    Deviations: offsets are the sequence's, not the token's: values and keys are centred per channel; a value's
    token scale is one logarithmic byte, since heads have pages of their own and share no scale; channel scales are
    those of the prompt, for later tokens too; classes are chosen per KV head.
    """

    hi: int = 4
    lo: int = 2
    salient: float = 0.6
    every: int = 100
    sinks: int = 4
    recent: int = 32

    name: ClassVar[str] = "zipcache"
    facts: ClassVar[Facts] = Facts(
        "bits, fewer for less salient tokens",
        "2405.14256",
        "centred codes with one-byte token scales, classes per head",
    )
    needs_calibration: ClassVar[bool] = False
    observes: ClassVar[str] = "attention"
    knob: ClassVar[str | None] = "salient"

    def __post_init__(self) -> None:
        for field in ("hi", "lo"):
            if getattr(self, field) not in (1, 2, 4, 8):
                raise ConfigError(f"zipcache has no {getattr(self, field)}-bit format; choose {field}=1, 2, 4 or 8")
        if self.lo >= self.hi:
            raise ConfigError(f"zipcache lo={self.lo} must be below hi={self.hi}; int4 and int8 have one width")
        if not 0 < self.salient < 1:
            raise ConfigError(f"zipcache salient={self.salient} is not a share between 0 and 1; the paper's is 0.6")
        if self.every < 1:
            raise ConfigError(f"zipcache every={self.every} is out of range; choose at least 1 token")
        check_near(self.name, self.sinks, self.recent)

    @property
    def positional(self) -> bool:
        return False

    def prepare(self, shape: CacheShape, statistics: Mapping[str, Tensor] | None) -> Prepared:
        raise NotImplementedError("zipcache is always staged")

    def stage(self, shape: CacheShape, statistics: Mapping[str, Tensor] | None) -> Encoder:
        formats = tuple(((_format(shape, bits),) * shape.kv_heads,) * shape.layers for bits in (self.hi, self.lo))

        def fit(held: HeldRows, classes: Tensor) -> list[Basis | None]:
            sizes = (shape.layers, shape.kv_heads, shape.head_dim)
            centre, scale = torch.zeros(sizes), torch.ones(sizes)
            middles, steps = torch.zeros(2, *sizes), torch.ones(2, *sizes)
            for layer, model_layer in enumerate(held.model_layers):
                keys, values = held.rows(layer)
                others = held.valid[layer] & ~held.first(self.sinks)[layer]
                low, high = _range(values, classes[layer] > 0, others)
                centre[model_layer], scale[model_layer] = (low + high) / 2, ((high - low) / 2).clamp(min=1e-6).sqrt()
                for index, bits in enumerate((self.hi, self.lo)):
                    low, high = _range(keys, classes[layer] == index + 1, others)
                    middles[index][model_layer] = (low + high) / 2
                    steps[index][model_layer] = ((high - low) / (2**bits - 1)).clamp(min=1e-6)
            value = Scaled(scale.half(), centre.half())
            return [
                Basis(Scaled(step.half(), middle.half()), value) for step, middle in zip(steps, middles, strict=True)
            ]

        return Encoder(
            formats,
            self.sinks,
            self.recent,
            (self.salient, 1 - self.salient),
            enough=ENOUGH,
            fit=fit,
            classify=lambda held, fresh: by_saliency(held, fresh, self.salient),
            watches=WATCHES,
            # Scale and origin of keys in each class, and of values.
            basis_bytes=3 * 2 * 2 * shape.layers * shape.kv_heads * shape.head_dim,
        )


def _format(shape: CacheShape, bits: int) -> PageFormat:
    # The fewest tokens that fill whole bytes: small blocks leave little of a page unused.
    key = Row((Segment(bits, shape.head_dim),))
    value = Row((Segment(bits, shape.head_dim),), Scale.STEP)
    return PageFormat(shape.page_bytes, shape.head_dim, max(1, 8 // bits), key, value)


def _range(rows: Tensor, which: Tensor, otherwise: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest number of each channel among some of the rows [G, R, d], [G, d] each.

    which: those rows, bool [G, R]; heads that have too few of them take the rows `otherwise`.
    """
    which = torch.where(which.sum(1, keepdim=True) < ENOUGH // 4, otherwise, which)
    low = rows.masked_fill(~which[..., None], float("inf")).amin(1)
    high = rows.masked_fill(~which[..., None], float("-inf")).amax(1)
    none = ~which.any(1)[:, None]
    return low.masked_fill(none, 0), high.masked_fill(none, 0)
