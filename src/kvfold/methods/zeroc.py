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
(`rank=` is the paper's form, and keeps 16-bit numbers).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from kvfold.errors import CalibrationError, ConfigError
from kvfold.kv.format import PageFormat, Row, Segment, raw_format
from kvfold.kv.layout import CacheLayout
from kvfold.methods.allocation import WIDTHS, allocate
from kvfold.methods.base import AttentionWeights, CacheShape, Prepared

MapName = Literal["optimal", "stacked"]
BLOCK = 16  # tokens sealed together
SIDES = ("key", "value")
FIELDS = ("a", "b", "offset", "step", "error", "weight")
MOST_NEAR = 2**20  # tokens; more than any model reads


@dataclass(frozen=True)
class ZeroC:
    """`zeroc(bits=4)`, `zeroc(rank=48)` or `zeroc(max_loss=0.01)`.

    bits: code bits per element, on average over the model, page ends included. rank: dimensions kept of every
    head, in 16 bits. max_loss: relative rise of perplexity allowed on held-out calibration text; the caller
    resolves it to bits by measuring. Raises ConfigError for values out of range.
    """

    bits: float | None = None
    rank: int | None = None
    max_loss: float | None = None
    map: str = "optimal"
    sinks: int = 4
    recent: int = 128

    name: ClassVar[str] = "zeroc"
    needs_calibration: ClassVar[bool] = True
    shares_prefixes: ClassVar[bool] = True

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
        if self.map not in get_args(MapName):
            raise ConfigError(f"zeroc map={self.map!r} is unknown; choose one of {', '.join(get_args(MapName))}")
        if not (0 <= self.sinks <= MOST_NEAR and 1 <= self.recent <= MOST_NEAR):
            raise ConfigError(
                f"zeroc needs sinks >= 0 and recent >= 1, both at most {MOST_NEAR}; the defaults are 4 and 128"
            )

    def prepare(self, shape: CacheShape, statistics: Mapping[str, Tensor] | None) -> Prepared:
        if statistics is None:
            raise CalibrationError("zeroc needs a calibration of this model; run `kvfold calibrate` first")
        if self.max_loss is not None:
            raise ConfigError("zeroc max_loss is resolved to bits by measuring; use LLM or the command line")
        sides = {side: _Side.read(statistics, self.map, side) for side in SIDES}
        bits = self._ranked(shape) if self.rank is not None else self._allocated(shape, sides)
        block = 1 if self.rank is not None else BLOCK
        # A budget of bits counts 16 for a dimension that stays a number, also where the cache is float32.
        stored = shape if self.rank is not None else replace(shape, raw_bits=16)
        far = tuple(
            tuple(_format(stored, block, [bits[s][layer, head] for s in SIDES]) for head in range(shape.kv_heads))
            for layer in range(shape.layers)
        )
        near = raw_format(shape.page_bytes, shape.head_dim, shape.raw_bits)
        maps = {s: sides[s].in_code_units(bits[s]) for s in SIDES}
        layout = CacheLayout(far, near, self.sinks, self.recent, shape.windows)
        return Prepared(layout, Fold(shape, maps))

    def _ranked(self, shape: CacheShape) -> dict[str, np.ndarray]:
        assert self.rank is not None
        if self.rank > shape.head_dim:
            raise ConfigError(f"zeroc rank={self.rank} exceeds the model's head_dim; choose at most {shape.head_dim}")
        kept = np.where(np.arange(shape.head_dim) < self.rank, 16, 0)
        bits = np.broadcast_to(kept, (shape.layers, shape.kv_heads, shape.head_dim))
        return dict.fromkeys(SIDES, bits)

    def _allocated(self, shape: CacheShape, sides: "Mapping[str, _Side]") -> dict[str, np.ndarray]:
        assert self.bits is not None
        heads = shape.layers * shape.kv_heads
        loss = torch.cat([(sides[s].error * sides[s].weight[..., None]).flatten(0, 1) for s in SIDES], 1)
        bits = allocate(loss.double().numpy(), self.bits, shape.page_bytes, BLOCK).bits
        split = bits.reshape(heads, 2, shape.head_dim).swapaxes(0, 1)
        return {s: x.reshape(shape.layers, shape.kv_heads, -1) for s, x in zip(SIDES, split, strict=True)}


@dataclass(frozen=True)
class Affine:
    """x' = x @ forward + shift in code units, and x = x' @ backward.mT + origin; [L, G, d, d] and [L, G, d]."""

    forward: Tensor
    shift: Tensor
    backward: Tensor
    origin: Tensor


@dataclass(frozen=True)
class _Side:
    """Keys or values of all heads in the calibrated basis: maps [L, G, d, d], quantisers [L, G, d, widths].

    error: mean squared error of a dimension at each width; weight [L, G, d]: what that error costs.
    """

    a: Tensor
    b: Tensor
    offset: Tensor
    step: Tensor
    error: Tensor
    weight: Tensor

    @classmethod
    def read(cls, statistics: Mapping[str, Tensor], map_name: str, side: str) -> "_Side":
        return cls(*(statistics[f"{map_name}.{side}.{field}"] for field in FIELDS))

    def in_code_units(self, bits: np.ndarray) -> Affine:
        """The maps with each dimension's quantiser folded in and dimensions ordered widest first."""
        widths = torch.from_numpy(np.ascontiguousarray(bits))
        order = widths.argsort(dim=-1, descending=True, stable=True)
        which = torch.searchsorted(torch.tensor(WIDTHS), widths.contiguous())[..., None]
        offset, step = (
            table.gather(-1, which)[..., 0].double().gather(-1, order) for table in (self.offset, self.step)
        )
        columns = order[..., None, :].expand_as(self.a)
        a, b = (m.double().gather(-1, columns) for m in (self.a, self.b))
        backward = b * step[..., None, :]
        origin = (b @ offset[..., None])[..., 0]
        return Affine(a / step[..., None, :], -offset / step, backward, origin)


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


def flat_statistics(shape: CacheShape) -> dict[str, Tensor]:
    """Statistics that tell dimensions and heads not apart: what a cache costs before anything is calibrated."""
    d = shape.head_dim
    heads = (shape.layers, shape.kv_heads)
    identity = torch.eye(d).expand(*heads, d, d)
    flat = torch.ones(*heads, d, len(WIDTHS))
    loss = torch.tensor([4.0**-bits for bits in WIDTHS]).expand_as(flat)
    values = (identity, identity, 0 * flat, flat, loss, torch.ones(*heads, d))
    return {
        f"{name}.{side}.{field}": x
        for name in get_args(MapName)
        for side in SIDES
        for field, x in zip(FIELDS, values, strict=True)
    }


def code_bits(layout: CacheLayout) -> float:
    """Bits per element of far pages, page ends included, averaged over heads."""
    per_token = [fmt.bytes_per_token for layer in layout.far for fmt in layer]
    return math.fsum(per_token) * 8 / (len(per_token) * 2 * layout.near.head_dim)
