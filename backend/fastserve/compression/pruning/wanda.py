"""Wanda (Sun et al., arXiv 2306.11695): the saliency of a weight is its magnitude times the norm of its
input."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta
from torch import Tensor

from fastserve.compression.calibration.hessian import damped
from fastserve.compression.calibration.layer import Moments
from fastserve.compression.pruning.pruning_step import SparsityStep
from fastserve.compression.pruning.reconstruction import reconstruct
from fastserve.compression.sparsity_patterns import UNSTRUCTURED, Pattern, Scope


def wanda_mask(weight: Tensor, hessian: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """A mask [N, K] bool, true where a weight [N, K] is kept, given the Hessian [K, K] of its inputs.

    The saliency is squared, W_nk^2 E[x_k^2]: the error of the output if inputs were uncorrelated, so that
    those of a block's weights add up. Single weights compete within their row; blocks, and rows, in the
    matrix.
    """
    scope: Scope = "row" if pattern == UNSTRUCTURED else "matrix"
    return pattern.mask(weight.square() * hessian.diagonal(), sparsity, scope)


class Wanda(SparsityStep, frozen=True, kw_only=True, tag="wanda"):
    """Leaves out the weights of least magnitude times norm of the input."""

    reconstruct: Annotated[bool, Meta(description="whether what is kept makes up for what is not")] = False

    def prune(self, weight: Tensor, moments: Moments, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """Masks by `wanda_mask`; with `reconstruct`, solves what is kept by least squares."""
        mask = wanda_mask(weight, moments.hessian, pattern, self.sparsity)
        if self.reconstruct:
            return reconstruct(weight, damped(moments.hessian), mask), mask
        return weight * mask, mask
