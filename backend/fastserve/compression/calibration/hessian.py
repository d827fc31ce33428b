"""The Hessian H = E[x x^T] of a linear's output error, over its inputs x, and what second-order methods need.

The error of a change D of the weight is E||D x||^2 = tr(D H D^T); H is the second moment of the inputs, which
the papers (GPTQ, SparseGPT) call the Hessian, up to a factor of 2."""

from __future__ import annotations

from typing import Annotated

import torch
from msgspec import Meta
from torch import Tensor

Damping = Annotated[
    float, Meta(gt=0, le=1, description="added to the diagonal of the Hessian, as a share of its mean")
]
Drift = Annotated[float, Meta(ge=0, le=1, description="share of the error of earlier layers to make up for")]
SMALLEST = 1e-10
"""Mean square of an input, at least, that damping is relative to: inputs may all be 0."""


def damped(hessian: Tensor, damping: float = 0.01) -> Tensor:
    """The Hessian [K, K] with `damping` times the mean of its diagonal added to it: then it has an
    inverse."""
    floor = damping * hessian.diagonal().mean().clamp(min=SMALLEST)
    return hessian + floor * torch.eye(len(hessian), device=hessian.device, dtype=hessian.dtype)


def normalized(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The Hessian [K, K] of inputs scaled to a mean square of 1, and the scales [K] that they had."""
    scales = hessian.diagonal().sqrt()
    return hessian / (scales[:, None] * scales), scales


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper triangular U [K, K] with U^T U = H^-1 (Cholesky), computed in float64."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian.double()))
    return torch.linalg.cholesky(inverse, upper=True).to(hessian.dtype)


def drift_corrected(weight: Tensor, hessian: Tensor, drift: Tensor, share: float) -> Tensor:
    """The weight [N, K] that maps the inputs as they are now to the outputs of the model before (GPTAQ,
    arXiv 2504.02692): least squares of W x_before by W' x.

    W' = W (I + share E[(x_before - x) x^T] E[x x^T]^-1), for a Hessian [K, K] that has an inverse and
    `drift` [K, K] = E[(x_before - x) x^T].
    """
    return (
        weight + share * torch.linalg.solve(hessian.double(), (weight @ drift).double(), left=False).float()
    )
