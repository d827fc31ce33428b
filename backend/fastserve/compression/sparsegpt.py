"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): pruning with the second order of the error.

Columns are pruned from left to right. To leave out w_j costs w_j^2 / [H^-1]_jj of output error, where H is the
gram of the inputs from j on; the weights from j on then make up for it as well as they can.
"""

from __future__ import annotations

from typing import Annotated

import torch
from msgspec import Meta
from torch import Tensor
from transformers import PretrainedConfig

from fastserve.compression.gptq import inverse_factor
from fastserve.compression.layer import Moments
from fastserve.compression.patterns import Pattern, TwoOfFour, parse_pattern
from fastserve.compression.pruning import SparsityStep
from fastserve.compression.reconstruction import damped, reconstruct
from fastserve.compression.step import RecipeError

COLUMNS = 128
"""Whose mask is chosen together. All blocks of `patterns` divide it."""


def sparsegpt(
    weight: Tensor, gram: Tensor, pattern: Pattern, sparsity: float, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """The weight [N, K] float32 after pruning, given the gram [K, K] of its inputs, and its mask [N, K]."""
    factor = inverse_factor(damped(gram, damping))
    weight, mask = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[1], COLUMNS):
        these, later = slice(start, start + COLUMNS), slice(start + COLUMNS, None)
        weight[:, these], mask[:, these], errors = _prune_columns(
            weight[:, these], factor[these, these], pattern, sparsity
        )
        weight[:, later] -= errors @ factor[these, later]
    return weight, mask


def _prune_columns(
    weight: Tensor, factor: Tensor, pattern: Pattern, sparsity: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Adjacent columns [N, C] after pruning, their mask, and the errors that later columns make up for.

    The factor [C, C] is theirs of the inverse gram's upper Cholesky factor U: [H^-1]_jj is U_jj^2.
    """
    weight, errors = weight.clone(), torch.empty_like(weight)
    together = 4 if isinstance(pattern, TwoOfFour) else weight.shape[1]
    masks: list[Tensor] = []
    for j in range(weight.shape[1]):
        if j % together == 0:
            these = slice(j, j + together)
            masks.append(pattern.choose((weight[:, these] / factor.diagonal()[these]).square(), sparsity))
        pruned = ~masks[-1][:, j % together]
        errors[:, j] = weight[:, j] * pruned / factor[j, j]
        weight[:, j:] -= errors[:, j, None] * factor[j, j:]
    mask = torch.cat(masks, dim=1)
    return weight * mask, mask, errors
