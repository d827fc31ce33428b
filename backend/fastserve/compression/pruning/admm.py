"""ADMM, the alternating direction method of multipliers: the mask of the weights that others can make up for.

Two copies of a weight are drawn together: one has the least output error, the other has the pattern. So the
mask is chosen in view of all columns at once (Boza, arXiv 2401.02938; ALPS, Meng et al., arXiv 2406.07831).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastserve.compression.calibration.hessian import normalized
from fastserve.compression.pruning.pruning_step import ReconstructingStep
from fastserve.compression.sparsity_patterns import Pattern

ITERATIONS = 20
FIRST_PENALTY, GROWTH = 0.1, 1.15
"""The penalty of the copies' distance, where an input of mean square 1 that is lost costs 1; times GROWTH
with each iteration. Three times as many iterations, more slowly, lower the output error by another 1 %."""


def admm_mask(weight: Tensor, hessian: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """A mask [N, K] bool, true where a weight [N, K] is kept, given the Hessian [K, K] of its inputs.

    The Hessian must have an inverse.
    """
    hessian, scales = normalized(hessian)
    weight = weight * scales
    values, vectors = torch.linalg.eigh(hessian)
    wanted = weight @ hessian @ vectors
    mask = pattern.mask(weight.square(), sparsity)
    sparse, multiplier = weight * mask, torch.zeros_like(weight)
    for iteration in range(ITERATIONS):
        penalty = FIRST_PENALTY * GROWTH**iteration
        pulled = (wanted + penalty * ((sparse - multiplier) @ vectors)) / (values + penalty) @ vectors.T
        total = pulled + multiplier
        mask = pattern.mask(total.square(), sparsity)
        sparse = total * mask
        multiplier = total - sparse
    return mask


class Admm(ReconstructingStep, frozen=True, kw_only=True, tag="admm"):
    """Leaves out the weights that the others can best make up for, in view of all columns at once."""

    def mask(self, weight: Tensor, hessian: Tensor, pattern: Pattern) -> Tensor:
        """The mask of `admm_mask`."""
        return admm_mask(weight, hessian, pattern, self.sparsity)
