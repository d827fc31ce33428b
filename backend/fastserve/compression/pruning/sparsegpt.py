"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): the mask of the weights that others can make up for.

Columns are pruned from left to right. To leave out w_j costs w_j^2 / [H^-1]_jj of output error, where H is
the Hessian of the inputs from j on; the weights from j on then make up for it as well as they can. The
paper stops there. Here its mask is taken, and all weights are solved anew for it (`reconstruction.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastserve.compression.calibration.hessian import inverse_factor
from fastserve.compression.pruning.pruning_step import ReconstructingStep
from fastserve.compression.sparsity_patterns import Pattern, TwoOfFour

COLUMNS = 128
"""Columns whose mask is chosen together. The columns of every block pattern divide it."""


def sparsegpt_mask(weight: Tensor, hessian: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """A mask [N, K] bool, true where a weight [N, K] is kept, given the Hessian [K, K] of its inputs.

    The Hessian must have an inverse.
    """
    factor, weight = inverse_factor(hessian), weight.clone()
    masks: list[Tensor] = []
    for start in range(0, weight.shape[1], COLUMNS):
        these, later = slice(start, start + COLUMNS), slice(start + COLUMNS, None)
        mask, errors = _prune(weight[:, these], factor[these, these], pattern, sparsity)
        masks.append(mask)
        weight[:, later] -= errors @ factor[these, later]
    return torch.cat(masks, dim=1)


def _prune(weight: Tensor, factor: Tensor, pattern: Pattern, sparsity: float) -> tuple[Tensor, Tensor]:
    """The mask of adjacent columns [N, C], which are changed in place, and the errors [N, C] that are left to
    later ones. [H^-1]_jj is the square of the factor's [C, C] diagonal."""
    errors = torch.empty_like(weight)
    scales = factor.diagonal()
    together = 4 if isinstance(pattern, TwoOfFour) else weight.shape[1]
    masks: list[Tensor] = []
    for j in range(weight.shape[1]):
        if j % together == 0:
            these = slice(j, j + together)
            masks.append(pattern.mask((weight[:, these] / scales[these]).square(), sparsity))
        kept = masks[-1][:, j % together]
        errors[:, j] = weight[:, j].masked_fill(kept, 0) / scales[j]
        weight[:, j + 1 :] -= errors[:, j, None] * factor[j, j + 1 :]
    return torch.cat(masks, dim=1), errors


class SparseGpt(ReconstructingStep, frozen=True, kw_only=True, tag="sparsegpt"):
    """Leaves out the weights that the others can best make up for, block of columns by block of columns."""

    def mask(self, weight: Tensor, hessian: Tensor, pattern: Pattern) -> Tensor:
        """The mask of `sparsegpt_mask`."""
        return sparsegpt_mask(weight, hessian, pattern, self.sparsity)
