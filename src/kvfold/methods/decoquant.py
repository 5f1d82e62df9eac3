"""DecoQuant (arXiv 2405.12591): the cache as a product of a large factor in few bits and a small one in 16."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvfold.errors import ConfigError
from kvfold.kv.format import PageFormat, Row, Scale, Segment
from kvfold.kv.frame import Basis, Factored
from kvfold.methods.base import CacheShape, Encoder, Facts, Prepared
from kvfold.methods.held import HeldRows
from kvfold.methods.quantiser import check_near

BLOCK = 16


@dataclass(frozen=True, kw_only=True)
class DecoQuant:
    """`decoquant(bits=4)`: a layer's keys (and its values), [T, G x d] reshaped to [T x G, d], are decomposed by SVD
    into a large factor [T x G, d] with orthonormal columns, stored in `bits` bits with a scale per token and head,
    and a small one [d, d] in 16 bits, which takes up the outliers.

    The small factor is made once, when the prompt (or context) is read; later tokens are written in its terms.
    Deviations: the large factor's scale is per token and head, since heads have pages of their own; sinks stay.
    """

    bits: int = 4
    sinks: int = 4
    recent: int = 32

    name: ClassVar[str] = "decoquant"
    facts: ClassVar[Facts] = Facts("bits", "2405.12591", "a scale per token and head, sinks stay in 16 bits")
    needs_calibration: ClassVar[bool] = False
    observes: ClassVar[str] = "keys and values"
    knob: ClassVar[str | None] = None
    every: ClassVar[int] = 32

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ConfigError(f"decoquant has no {self.bits}-bit format; choose 1 to 8 bits")
        check_near(self.name, self.sinks, self.recent)

    @property
    def positional(self) -> bool:
        return False

    def prepare(self, shape: CacheShape, statistics: Mapping[str, Tensor] | None) -> Prepared:
        raise NotImplementedError("decoquant is always staged")

    def stage(self, shape: CacheShape, statistics: Mapping[str, Tensor] | None) -> Encoder:
        row = Row((Segment(self.bits, shape.head_dim),), Scale.TOKEN)
        fmt = PageFormat(shape.page_bytes, shape.head_dim, BLOCK, row, row)

        def fit(held: HeldRows, classes: Tensor) -> list[Basis | None]:
            small = torch.zeros(2, shape.layers, shape.head_dim, shape.head_dim, dtype=torch.float16)
            small[:] = torch.eye(shape.head_dim)
            for layer, model_layer in enumerate(held.model_layers):
                for side, rows in zip(small, held.rows(layer), strict=True):
                    side[model_layer] = _small_factor(rows[held.valid[layer]])
            return [Basis(Factored(small[0]), Factored(small[1]))]

        formats = ((fmt,) * shape.kv_heads,) * shape.layers
        small = shape.layers * shape.head_dim * shape.head_dim  # numbers of a factor, of keys or of values
        return Encoder((formats,), self.sinks, self.recent, fit=fit, enough=shape.head_dim, basis_bytes=2 * 2 * small)


def _small_factor(rows: Tensor) -> Tensor:
    """B with rows [n, d] = U B^T, the columns of U orthogonal and of mean square 1; float16 [d, d]."""
    values, vectors = torch.linalg.eigh((rows.mT @ rows).double() / max(len(rows), 1))
    # Directions that no token has must stay invertible in 16 bits.
    size = values.clamp(min=1e-6 * float(values[-1]) + 1e-12).sqrt()
    factor: Tensor = (vectors * size).half()
    return factor
