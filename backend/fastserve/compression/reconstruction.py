"""What remains of a pruned weight, solved anew: least squares of the output, the mask held."""

from __future__ import annotations

import torch
from torch import Tensor

BATCH_ELEMENTS = 1 << 25
"""Elements of the grams of kept columns that are factorised together: 128 MB in float32."""


def damped(gram: Tensor, damping: float) -> Tensor:
    """The gram [K, K] with `damping` times the mean of its diagonal added to it, so that it has an inverse."""
    floor = damping * gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    return gram + floor * torch.eye(len(gram), device=gram.device, dtype=gram.dtype)


def reconstruct(weight: Tensor, gram: Tensor, mask: Tensor, damping: float = 0.01) -> Tensor:
    """The weight [N, K], zero where the mask is false, whose output is nearest to that of `weight`."""
    gram = damped(gram, damping)
    targets = weight @ gram
    counts = mask.sum(1)
    result = torch.zeros_like(weight)
    order = counts.argsort(descending=True)
    batch = max(1, BATCH_ELEMENTS // max(int(counts.max()), 1) ** 2)
    for rows in order.split(batch):
        width = int(counts[rows].max())
        columns = mask[rows].to(torch.uint8).topk(width, dim=1).indices if width else None
        if columns is None:
            break
        kept = mask[rows].gather(1, columns)
        grams = gram[columns[:, :, None], columns[:, None, :]]
        both = kept[:, :, None] & kept[:, None, :]
        grams = torch.where(both, grams, 0) + torch.diag_embed((~kept).to(grams.dtype))
        right = targets[rows].gather(1, columns) * kept
        solution = torch.cholesky_solve(right[..., None], torch.linalg.cholesky(grams))[..., 0]
        result[rows] = result[rows].scatter(1, columns, solution)
    return result
