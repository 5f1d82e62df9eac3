"""Quantisers of a sequence's own: middle and step of every dimension, chosen on the rows that are about to be coded."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvfold.kv.frame import Basis, Mapped, Rescaled
from kvfold.methods.held import HeldRows

ROWS = 512  # of a head, evenly picked, that quantisers are fitted to
ENOUGH = 128  # with fewer the calibrated ones are the better guess
STEPS = tuple(2.0 ** (i / 4) for i in range(-5, 7))  # against the calibrated step


def requantised(
    bases: Sequence[Basis], widths: Sequence[Sequence[Tensor]], held: HeldRows, classes: Tensor
) -> list[Basis]:
    """The bases of each class with the steps and middles of least squared error on the rows that go there.

    widths: bits of every dimension by class and side, int64 [L, G, d]; classes: class of each row that is coded,
    int64 [layers, G, R] (0: none). Heads with few such rows keep what was calibrated.
    """
    found = []
    for index, (basis, sides) in enumerate(zip(bases, widths, strict=True)):
        frames = []
        for side, (frame, bits) in enumerate(zip((basis.key, basis.value), sides, strict=True)):
            assert isinstance(frame, Mapped)
            step, middle = torch.ones(bits.shape), torch.zeros(bits.shape)
            for layer, model_layer in enumerate(held.model_layers):
                rows = held.rows(layer)[side]
                for head in range(held.kv_heads):
                    own = rows[head, classes[layer, head] == index + 1]
                    if len(own) >= ENOUGH:
                        own = own[torch.linspace(0, len(own) - 1, min(ROWS, len(own))).long()]
                        u = frame.into(model_layer, torch.tensor([head]), own[None])[0]
                        where = (model_layer, head)
                        step[where], middle[where] = fitted(u, bits[where])
            frames.append(Rescaled.of(frame, step, middle))
        found.append(Basis(*frames))
    return found


def fitted(u: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Step and middle [d] of each dimension of the rows u [n, d] in code units, int64 `bits` [d].

    Where nothing is stored the middle is all that is known of a row. Two levels stay as calibrated: with so few the
    least squared error is not what disturbs attention least (measured).
    """
    middle = u.mean(0)
    top = (2.0**bits - 1) / 2
    centred = u - middle
    best, step = torch.full_like(middle, torch.inf), torch.ones_like(middle)
    for size in STEPS:
        scaled = centred / size
        # Codes lie at whole numbers from the lowest level on.
        code = ((scaled + top).round().maximum(torch.zeros_like(top)).minimum(2 * top) - top) * size
        error = (code - centred).square().sum(0)
        step = torch.where(error < best, size, step)
        best = best.minimum(error)
    coded = (bits > 1) & (bits < 16)
    return torch.where(coded, step, 1.0), middle.masked_fill((bits == 16) | (bits == 1), 0.0)
