"""The gram matrix G = E[x x^T] of a linear's inputs, and what the methods of second order make of it."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-10
"""Mean square of an input, at least, that damping is relative to: inputs may all be 0."""


def damped(hessian: Tensor, damping: float = 0.01) -> Tensor:
    """A gram [K, K] with an inverse: `damping` times the mean of the diagonal is added to that."""
    floor = damping * hessian.diagonal().mean().clamp(min=SMALLEST)
    return hessian + floor * torch.eye(len(hessian), device=hessian.device, dtype=hessian.dtype)


def normalized(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The gram of inputs scaled to a mean square of 1, and the scales [K] that they had."""
    scales = hessian.diagonal().sqrt()
    return hessian / (scales[:, None] * scales), scales


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper triangular U with U^T U = gram^-1, computed in float64."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian.double()))
    return torch.linalg.cholesky(inverse, upper=True).to(hessian.dtype)


def drift_corrected(weight: Tensor, hessian: Tensor, drift: Tensor, share: float) -> Tensor:
    """The weight [N, K] that maps inputs now to the outputs before: least squares of W x_before by W' x.

    W' = W (I + share E[(x_before - x) x^T] E[x x^T]^-1), for a gram matrix [K, K] that has an inverse.
    """
    return (
        weight + share * torch.linalg.solve(hessian.double(), (weight @ drift).double(), left=False).float()
    )
