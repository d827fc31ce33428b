"""Wanda (Sun et al., arXiv 2306.11695): a weight costs its magnitude times the norm of its input."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta
from torch import Tensor

from fastserve.compression.layer import Moments
from fastserve.compression.patterns import UNSTRUCTURED, Pattern, Scope, parse_pattern
from fastserve.compression.pruning import SparsityStep
from fastserve.compression.reconstruction import reconstruct


def wanda_mask(weight: Tensor, gram: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """A mask [N, K] bool, true where a weight [N, K] is kept, given the gram [K, K] of its inputs.

    The cost is squared, |W_nk|^2 E[x_k^2]: the error of the output if inputs were uncorrelated, so that those
    of a block add up. Single weights compete within their row, blocks within the matrix, as do rows.
    """
    scope: Scope = "row" if pattern == UNSTRUCTURED else "matrix"
    return pattern.choose(weight.square() * gram.diagonal(), sparsity, scope)


class Wanda(SparsityStep, frozen=True, kw_only=True, tag="wanda"):
    """Prunes by magnitude times the norm of the input."""

    reconstruct: Annotated[bool, Meta(description="whether what is kept makes up for what is not")] = False

    def prune(self, weight: Tensor, moments: Moments) -> tuple[Tensor, Tensor]:
        mask = wanda_mask(weight, moments.gram, parse_pattern(self.pattern), self.sparsity)
        return (reconstruct(weight, moments.gram, mask) if self.reconstruct else weight * mask), mask
