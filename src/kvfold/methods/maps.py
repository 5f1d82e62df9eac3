"""Bases in which keys and values are cheap to cut: score-optimal, output-aware, and the papers' stacked SVD.

A map pair (A, B), both [..., d, d], satisfies B A^T = I: x' = A^T x is stored, B x' gives x back, and a query
meets a stored key as (B^T q) . (A^T k) = q . k. Dimensions come most important first.
"""

import torch
from torch import Tensor

RIDGE = 1e-6  # relative to the mean eigenvalue: keeps directions that calibration never saw invertible


def weighted_map(weight: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The pair that minimises the weighted error trace(W E) of a cut in any number of dimensions.

    weight: [..., d, d], Gram of what rows are multiplied with: C_Q, the sum of Q^T Q over the heads of the group,
    for keys (score-optimal, KQ-SVD, arXiv 2512.05916); the sum of W_O,h W_O,h^T for values (output-aware).
    covariance: [..., d, d] of the centred rows. With W^1/2 C W^1/2 = U S^2 U^T: A = W^1/2 U, B = W^-1/2 U, and the
    error of keeping r dimensions is exactly the sum of the other S^2. float64.
    """
    values, vectors = torch.linalg.eigh(_ridged(weight))
    root = (vectors * values.sqrt().unsqueeze(-2)) @ vectors.mT
    inverse = (vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mT
    _, basis = torch.linalg.eigh(root @ covariance.double() @ root)
    basis = basis.flip(-1)
    return root @ basis, inverse @ basis


def stacked_map(*grams: Tensor) -> tuple[Tensor, Tensor]:
    """The papers' map (arXiv 2408.04107): right singular vectors of the stacked rows, an orthogonal pair.

    grams: [..., d, d] each, Q^T Q (summed over the group) and K^T K for keys, V^T V alone for values.
    """
    _, basis = torch.linalg.eigh(torch.stack([_normalised(g) for g in grams]).sum(0))
    basis = basis.flip(-1)
    return basis, basis


def _normalised(gram: Tensor) -> Tensor:
    """Scaled to trace d, so that neither side of a stack drowns the other by its mere size."""
    gram = gram.double()
    return gram * (gram.shape[-1] / gram.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=1e-30))[..., None, None]


def _ridged(gram: Tensor) -> Tensor:
    gram = gram.double()
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)
    return gram + RIDGE * mean[..., None, None] * torch.eye(gram.shape[-1], dtype=torch.float64)
