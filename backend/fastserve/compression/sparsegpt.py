"""Second-order pruning: SparseGPT (Frantar and Alistarh, arXiv 2301.00774).

Columns are gone through from left to right. Leaving out a weight costs w^2 / [H^-1]_jj of output error, with
H the gram matrix of the inputs that are still to come; the columns after it then make up for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastserve.compression.patterns import Pattern, TwoOfFour


def damped(gram: Tensor, damping: float) -> Tensor:
    """The gram [K, K] with `damping` times the mean of its diagonal added to it, so that it has an inverse."""
    floor = damping * gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    return gram + floor * torch.eye(len(gram), device=gram.device, dtype=gram.dtype)


def prune(
    weight: Tensor, gram: Tensor, pattern: Pattern, sparsity: float, damping: float = 0.01, columns: int = 128
) -> tuple[Tensor, Tensor]:
    """The pruned weight [N, K] float32, and its mask [N, K] bool, true where a weight is kept."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(gram, damping)))
    factor = torch.linalg.cholesky(inverse, upper=True)
    weight = weight.clone()
    mask = torch.ones_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[1], columns):
        stop = min(start + columns, weight.shape[1])
        here, kept, errors = prune_columns(weight[:, start:stop], factor[start:stop, start:stop], pattern, sparsity)
        weight[:, start:stop], mask[:, start:stop] = here, kept
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return weight, mask


def prune_columns(
    weight: Tensor, factor: Tensor, pattern: Pattern, sparsity: float
) -> tuple[Tensor, Tensor, Tensor]:
    weight = weight.clone()
    scale = factor.diagonal()
    if isinstance(pattern, TwoOfFour):
        mask = torch.ones_like(weight, dtype=torch.bool)
    else:
        mask = pattern.choose((weight / scale) ** 2, sparsity)
    errors = torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        if isinstance(pattern, TwoOfFour) and j % 4 == 0:
            four = slice(j, j + 4)
            mask[:, four] = pattern.choose((weight[:, four] / scale[four]) ** 2, sparsity)
        errors[:, j] = weight[:, j] * ~mask[:, j] / scale[j]
        weight[:, j:] -= errors[:, j, None] * factor[j, j:]
    return weight * mask, mask, errors
