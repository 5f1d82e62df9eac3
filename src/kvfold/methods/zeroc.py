"""ZeroC (arXiv 2408.04107; v2 "ZACK", v3 "FDC"): compression inside the model's own matrix products.

Per layer and KV head a pair of maps turns rows into a basis where few bits matter, and offset and step of every
dimension's quantiser are folded in with them, so that rows arrive in code units: encoding is rounding, decoding
is nothing, and a page holds codes alone.

Values fold exactly into W_V and W_O (the offset becomes a bias after W_O, since attention weights sum to 1).
Keys and queries fold into W_K and W_Q where the model has no RoPE; with RoPE the map is applied once per new
token and query, after the rotation. A key's offset is the same number added to all scores of a query, which
softmax ignores; near rows are kept in the same units, so near and far meet without correction.

Deviations from the paper: maps are score-optimal and output-aware instead of the stacked SVD (`map="stacked"`
is the paper's), and dimensions are given 0 to 16 bits each by one global allocation instead of one rank per layer
(`rank=` is the paper's form, and keeps 16-bit numbers). `salient_bits=` is the first version's hybrid of layers and
tokens: the tokens of most normalised attention (ZipCache's measure) get another budget than the rest.

In a staged cache (with a policy, or with salient_bits) near tokens stay in the model's own units and the maps are
applied to queries and outputs at run time instead of to the weights: one sequence then holds rows in several units.
So it may have quantisers of its own: steps and middles are then fitted to its rows when they are coded first
(`requantise`), 8 bytes per dimension and sequence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, get_args

import numpy as np
import torch
from torch import Tensor

from kvfold.errors import CalibrationError, ConfigError
from kvfold.kv.format import PageFormat, Row, Segment, raw_format
from kvfold.kv.frame import Basis, Mapped
from kvfold.kv.layout import CacheLayout
from kvfold.methods.allocation import allocate
from kvfold.methods.base import AttentionWeights, CacheShape, Encoder, Facts, Prepared
from kvfold.methods.calibrated import SIDES, Affine, MapName, Side, ordered
from kvfold.methods.held import HeldRows
from kvfold.methods.quantiser import check_near
from kvfold.methods.requantise import requantised
from kvfold.methods.saliency import WATCHES, by_saliency

BLOCK = 16  # tokens sealed together


@dataclass(frozen=True)
class ZeroC:
    """`zeroc(bits=4)`, `zeroc(rank=48)`, `zeroc(max_loss=0.01)` or `zeroc(bits=3, salient_bits=6, salient=0.1)`.

    bits: code bits per element, on average over the model, page ends included. rank: dimensions kept of every
    head, in 16 bits. max_loss: relative rise of perplexity allowed on held-out calibration text; the caller
    resolves it to bits by measuring. salient_bits: code bits of the most salient share `salient` of a head's tokens,
    the others having `bits`. Raises ConfigError for values out of range.
    """

    bits: float | None = None
    rank: int | None = None
    max_loss: float | None = None
    map: str = "optimal"
    sinks: int = 4
    recent: int = 128
    salient_bits: float | None = None
    salient: float = 0.1

    name: ClassVar[str] = "zeroc"
    facts: ClassVar[Facts] = Facts(
        "bits and dimensions, by a calibrated budget; no scales",
        "2408.04107",
        "score-optimal and output-aware maps, widths per dimension by one global allocation",
    )
    needs_calibration: ClassVar[bool] = True
    knob: ClassVar[str | None] = "bits"

    every: ClassVar[int] = 32

    @property
    def positional(self) -> bool:
        return self.salient_bits is None

    def __post_init__(self) -> None:
        if sum(x is not None for x in (self.bits, self.rank, self.max_loss)) > 1:
            raise ConfigError("zeroc takes one of bits, rank and max_loss; leave the others out")
        if self.bits is None and self.rank is None and self.max_loss is None:
            object.__setattr__(self, "bits", 4.0)
        if self.bits is not None and not 1 <= self.bits <= 16:
            raise ConfigError(f"zeroc bits={self.bits} is out of range; choose 1 to 16 bits per element")
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"zeroc rank={self.rank} is out of range; choose 1 to the model's head_dim")
        if self.max_loss is not None and not 0 < self.max_loss < 1:
            raise ConfigError(f"zeroc max_loss={self.max_loss} is out of range; 0.01 allows 1 % more perplexity")
        if self.salient_bits is not None:
            if self.bits is None or not self.bits < self.salient_bits <= 16:
                raise ConfigError(
                    f"zeroc salient_bits={self.salient_bits} goes with bits and must be above them, at most 16"
                )
            if not 0 < self.salient < 1:
                raise ConfigError(f"zeroc salient={self.salient} is not a share between 0 and 1; 0.1 is a tenth")
        if self.map not in get_args(MapName):
            raise ConfigError(f"zeroc map={self.map!r} is unknown; choose one of {', '.join(get_args(MapName))}")
        check_near(self.name, self.sinks, self.recent)

    def prepare(self, shape: CacheShape, statistics: Mapping[str, Tensor] | None) -> Prepared:
        sides = self._sides(statistics)
        bits = self._widths(shape, sides, self.bits)
        near = raw_format(shape.page_bytes, shape.head_dim, shape.raw_bits)
        maps = {s: sides[s].in_code_units(bits[s]) for s in SIDES}
        layout = CacheLayout(self._formats(shape, bits), near, self.sinks, self.recent, shape.windows)
        return Prepared(layout, Fold(shape, maps))

    def stage(self, shape: CacheShape, statistics: Mapping[str, Tensor] | None) -> Encoder:
        sides = self._sides(statistics)
        rates = [self.bits] if self.salient_bits is None else [self.salient_bits, self.bits]
        classes = [self._widths(shape, sides, rate) for rate in rates]
        bases: list[Basis] = []
        for bits in classes:
            key, value = (sides[s].in_code_units(bits[s]) for s in SIDES)
            # What all far keys have in common is no longer common to all keys, the near ones being as they are.
            bases.append(Basis(_mapped(key), _mapped(value)))
        formats = tuple(self._formats(shape, bits) for bits in classes)
        widths = [[ordered(bits[s])[0] for s in SIDES] for bits in classes]

        def fit(held: HeldRows, classes: Tensor) -> Sequence[Basis]:
            return bases if self.rank is not None else requantised(bases, widths, held, classes)

        # Step and middle in 16 bits, origin in 32, of keys and of values.
        own = 0 if self.rank is not None else 2 * 8 * len(rates) * shape.layers * shape.kv_heads * shape.head_dim
        if self.salient_bits is None:
            return Encoder(formats, self.sinks, self.recent, fit=fit, basis_bytes=own, shared=bases)
        return Encoder(
            formats,
            self.sinks,
            self.recent,
            (self.salient, 1 - self.salient),
            fit=fit,
            basis_bytes=own,
            shared=bases,
            classify=lambda held, fresh: by_saliency(held, fresh, self.salient),
            watches=WATCHES,
        )

    def _sides(self, statistics: Mapping[str, Tensor] | None) -> Mapping[str, Side]:
        if statistics is None:
            raise CalibrationError("zeroc needs a calibration of this model; run `kvfold calibrate` first")
        if self.max_loss is not None:
            raise ConfigError("zeroc max_loss is resolved to bits by measuring; use LLM or the command line")
        return {side: Side.read(statistics, self.map, side) for side in SIDES}

    def _widths(self, shape: CacheShape, sides: Mapping[str, Side], bits: float | None) -> Mapping[str, np.ndarray]:
        """Bits of every dimension, [layers, G, d] of each side."""
        return self._ranked(shape) if bits is None else self._allocated(shape, sides, bits)

    def _formats(self, shape: CacheShape, bits: Mapping[str, np.ndarray]) -> tuple[tuple[PageFormat, ...], ...]:
        block = 1 if self.rank is not None else BLOCK
        # A budget of bits counts 16 for a dimension that stays a number, also where the cache is float32.
        stored = shape if self.rank is not None else replace(shape, raw_bits=16)
        return tuple(
            tuple(_format(stored, block, [bits[s][layer, head] for s in SIDES]) for head in range(shape.kv_heads))
            for layer in range(shape.layers)
        )

    def _ranked(self, shape: CacheShape) -> dict[str, np.ndarray]:
        assert self.rank is not None
        if self.rank > shape.head_dim:
            raise ConfigError(f"zeroc rank={self.rank} exceeds the model's head_dim; choose at most {shape.head_dim}")
        kept = np.where(np.arange(shape.head_dim) < self.rank, 16, 0)
        bits = np.broadcast_to(kept, (shape.layers, shape.kv_heads, shape.head_dim))
        return dict.fromkeys(SIDES, bits)

    def _allocated(self, shape: CacheShape, sides: Mapping[str, Side], rate: float) -> dict[str, np.ndarray]:
        heads = shape.layers * shape.kv_heads
        loss = torch.cat([(sides[s].error * sides[s].weight[..., None]).flatten(0, 1) for s in SIDES], 1)
        bits = allocate(loss.double().numpy(), rate, shape.page_bytes, BLOCK).bits
        split = bits.reshape(heads, 2, shape.head_dim).swapaxes(0, 1)
        return {s: x.reshape(shape.layers, shape.kv_heads, -1) for s, x in zip(SIDES, split, strict=True)}


def _mapped(affine: Affine) -> Mapped:
    return Mapped(affine.forward.float(), affine.backward.float(), affine.shift.float(), affine.origin.float())


def _format(shape: CacheShape, block: int, bits: list[np.ndarray]) -> PageFormat:
    key, value = (_row(np.sort(b)[::-1], shape.raw_bits) for b in bits)
    return PageFormat(shape.page_bytes, shape.head_dim, block, key, value)


def _row(widths: np.ndarray, raw_bits: int) -> Row:
    segments = []
    for width in sorted(set(widths.tolist()) - {0}, reverse=True):
        segments.append(Segment(raw_bits if width == 16 else width, int((widths == width).sum())))
    return Row(tuple(segments))


@dataclass(frozen=True)
class Fold:
    """Folds the affine maps of keys and values into one layer's weights. Implements `Transform`."""

    shape: CacheShape
    maps: Mapping[str, Affine]

    def __call__(self, layer: int, weights: AttentionWeights) -> AttentionWeights:
        shape = self.shape
        d, group = shape.head_dim, shape.heads // shape.kv_heads
        key, value = self.maps["key"], self.maps["value"]
        q, k, v = weights.qkv.double().unflatten(0, (-1, d)).split([shape.heads, shape.kv_heads, shape.kv_heads])
        bias = weights.qkv_bias
        rows = (
            torch.zeros(q.shape[0] + 2 * k.shape[0], d, dtype=torch.float64)
            if bias is None
            else bias.double().view(-1, d)
        )
        q_bias, k_bias, v_bias = rows.split([shape.heads, shape.kv_heads, shape.kv_heads])
        v, v_bias = _folded(v, v_bias, value.forward[layer], value.shift[layer])
        out = weights.out.double().unflatten(1, (shape.kv_heads, group, d))
        out_bias = torch.einsum("ojgd,jd->o", out, value.origin[layer])
        out = torch.einsum("ojgd,jde->ojge", out, value.backward[layer])
        if weights.out_bias is not None:
            out_bias = out_bias + weights.out_bias.double()
        maps: dict[str, Tensor] = {}
        if shape.rope:
            maps = {"query_map": key.backward[layer], "key_map": key.forward[layer], "key_shift": key.shift[layer]}
        else:
            k, k_bias = _folded(k, k_bias, key.forward[layer], key.shift[layer])
            per_query = key.backward[layer].repeat_interleave(group, 0)
            q, q_bias = _folded(q, q_bias, per_query, torch.zeros_like(q_bias))
        dtype, hidden = weights.qkv.dtype, weights.qkv.shape[1]
        return AttentionWeights(
            torch.cat([q, k, v]).reshape(-1, hidden).to(dtype),
            torch.cat([q_bias, k_bias, v_bias]).flatten().to(dtype),
            out.reshape(hidden, -1).to(dtype),
            out_bias.to(dtype),
            **{name: m.to(dtype) for name, m in maps.items()},
        )


def _folded(weight: Tensor, bias: Tensor, forward: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """weight [heads, d, D] and bias [heads, d] of rows x such that they give x @ forward + shift."""
    return forward.mT @ weight, (bias[:, None] @ forward)[:, 0] + shift
