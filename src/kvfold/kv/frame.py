"""Coordinates that a sequence's coded rows are stored in: scaled, selected or mapped dimensions of the model's own.

Attention never brings stored rows back: it takes queries to the stored coordinates and lifts the weighted sum of
stored values. With x = lift(u) + origin, q . x = turn(q) . u + q . origin.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Lifting:
    """`Frame.lift` as numbers, for kernels: x = matrix @ (scale * u), or x[index] = u. What is None is left out.

    matrix: [L, G or 1, d, d], of which the first columns count where less is stored; scale: [L, G, d], both float16 or
    float32; index: int16 [L, G, r].
    """

    matrix: Tensor | None = None
    scale: Tensor | None = None
    index: Tensor | None = None


class Frame(Protocol):
    """Rows of one side (keys or values) of all layers and heads. x: the model's rows [heads, n, d], of the KV heads
    `heads` of a layer; u: stored rows [heads, n, r]."""

    @property
    def origin(self) -> Tensor | None:
        """Where u = 0 lies, [L, G, d]."""
        ...

    @property
    def lifting(self) -> Lifting: ...

    def into(self, layer: int, heads: Tensor, x: Tensor) -> Tensor:
        """x to u."""
        ...

    def lift(self, layer: int, heads: Tensor, u: Tensor) -> Tensor:
        """u to x without the origin."""
        ...

    def turn(self, layer: int, heads: Tensor, q: Tensor) -> Tensor:
        """Queries [..., heads, n, d] to [..., heads, n, r], the transpose of `lift`."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that a sequence holds for it; 0 where all sequences share it."""
        ...


@dataclass(frozen=True)
class Scaled:
    """u = (x - origin) / scale per dimension. scale, origin: float16 [L, G, d]."""

    scale: Tensor
    origin: Tensor | None = None

    def into(self, layer: int, heads: Tensor, x: Tensor) -> Tensor:
        shifted = x if self.origin is None else x - self.origin[layer, heads].float()[:, None]
        return shifted / self._scale(layer, heads)

    def lift(self, layer: int, heads: Tensor, u: Tensor) -> Tensor:
        return u * self._scale(layer, heads)

    turn = lift

    def _scale(self, layer: int, heads: Tensor) -> Tensor:
        return self.scale[layer, heads].float()[:, None]

    @property
    def lifting(self) -> Lifting:
        return Lifting(scale=self.scale)

    @property
    def nbytes(self) -> int:
        return self.scale.nbytes + (0 if self.origin is None else self.origin.nbytes)


@dataclass(frozen=True)
class Selected:
    """u = the dimensions of x that `index` names. index: int16 [L, G, r]; dims: the model's head_dim."""

    index: Tensor
    dims: int
    origin: Tensor | None = None

    def into(self, layer: int, heads: Tensor, x: Tensor) -> Tensor:
        index = self.index[layer, heads].long()[:, None].expand(*x.shape[:-1], -1)
        return x.gather(-1, index)

    turn = into

    def lift(self, layer: int, heads: Tensor, u: Tensor) -> Tensor:
        index = self.index[layer, heads].long()[:, None].expand_as(u)
        return u.new_zeros(*u.shape[:-1], self.dims).scatter(-1, index, u)

    @property
    def lifting(self) -> Lifting:
        return Lifting(index=self.index)

    @property
    def nbytes(self) -> int:
        return self.index.nbytes


@dataclass(frozen=True)
class Mapped:
    """u = x @ forward + shift and x = u @ backward^T + origin, the same for all sequences; float32 [L, G, d, d] and
    [L, G, d]."""

    forward: Tensor
    backward: Tensor
    shift: Tensor
    origin: Tensor | None

    def into(self, layer: int, heads: Tensor, x: Tensor) -> Tensor:
        return x @ self.forward[layer, heads] + self.shift[layer, heads][:, None]

    def lift(self, layer: int, heads: Tensor, u: Tensor) -> Tensor:
        # Dimensions of 0 bits come last and are not stored.
        return u @ self.backward[layer, heads][..., : u.shape[-1]].mT

    def turn(self, layer: int, heads: Tensor, q: Tensor) -> Tensor:
        return q @ self.backward[layer, heads]

    @property
    def lifting(self) -> Lifting:
        return Lifting(matrix=self.backward)

    @property
    def nbytes(self) -> int:
        return 0


@dataclass(frozen=True)
class Rescaled:
    """u = (inner(x) - middle) / step with steps and middles of a sequence's own, float16 [L, G, d]; origin: x at u = 0,
    float32 [L, G, d]."""

    inner: Mapped
    step: Tensor
    middle: Tensor
    origin: Tensor

    @classmethod
    def of(cls, inner: Mapped, step: Tensor, middle: Tensor) -> "Rescaled":
        """step, middle: float32 [L, G, d], in the units of `inner`."""
        middle = middle.half()
        lifted = (inner.backward @ middle.float()[..., None])[..., 0]
        return cls(inner, step.half(), middle, lifted if inner.origin is None else lifted + inner.origin)

    def into(self, layer: int, heads: Tensor, x: Tensor) -> Tensor:
        middle, step = (t[layer, heads].float()[:, None] for t in (self.middle, self.step))
        return (self.inner.into(layer, heads, x) - middle) / step

    def lift(self, layer: int, heads: Tensor, u: Tensor) -> Tensor:
        return self.inner.lift(layer, heads, u * self.step[layer, heads].float()[:, None, : u.shape[-1]])

    def turn(self, layer: int, heads: Tensor, q: Tensor) -> Tensor:
        return self.inner.turn(layer, heads, q) * self.step[layer, heads].float()[:, None]

    @property
    def lifting(self) -> Lifting:
        return Lifting(matrix=self.inner.backward, scale=self.step)

    @property
    def nbytes(self) -> int:
        return self.step.nbytes + self.middle.nbytes + self.origin.nbytes


@dataclass(frozen=True)
class Factored:
    """x = u @ factor^T, one factor per layer for all of its heads. factor: float16 [L, d, d], invertible."""

    factor: Tensor
    origin: Tensor | None = None

    def into(self, layer: int, heads: Tensor, x: Tensor) -> Tensor:
        u: Tensor = torch.linalg.solve(self.factor[layer].double(), x.mT.double()).mT.float()
        return u

    def lift(self, layer: int, heads: Tensor, u: Tensor) -> Tensor:
        return u @ self.factor[layer].float().mT

    def turn(self, layer: int, heads: Tensor, q: Tensor) -> Tensor:
        return q @ self.factor[layer].float()

    @property
    def lifting(self) -> Lifting:
        return Lifting(matrix=self.factor[:, None])

    @property
    def nbytes(self) -> int:
        return self.factor.nbytes


@dataclass(frozen=True)
class Basis:
    """The frames of keys and values; None: the model's own rows."""

    key: Frame | None
    value: Frame | None


KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (Scaled, Selected, Mapped, Rescaled, Factored)}
