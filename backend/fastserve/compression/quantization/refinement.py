"""Refinement of codes and scales in turns, by coordinate descent: the output error falls with every turn.

The error of a row is (q - w) H (q - w)^T, with q its values, w its target and H the Hessian of the
inputs. The codes of a row are improved one at a time (coordinate descent, as in QuantEase, arXiv 2309.01885);
then the scales of all its groups at once, by least squares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastserve.compression.quantization.grid import Grid

COLUMNS = 128
"""Columns that are descended along before their changes reach all others."""
_PULL = 1e-3
"""Pull of scales to what they were, relative to the curvature of the error: decides where a group has
none."""
_FURTHEST = 1.5
"""Factor by which a scale may change in one turn."""


def refine(
    weight: Tensor, hessian: Tensor, grid: Grid, codes: Tensor, mask: Tensor | None, turns: int
) -> tuple[Grid, Tensor]:
    """A grid and codes [N, K] of less error for a target [N, K]; where the mask is false values stay 0."""
    for _ in range(turns):
        grid = fit_scales(weight, hessian, grid, codes)
        codes = coordinate_descent(weight, hessian, grid, codes, mask)
    return grid, codes


def coordinate_descent(
    weight: Tensor, hessian: Tensor, grid: Grid, codes: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Gives each code in turn its best value while the others stay. Twice over all columns."""
    scales, zeros = (tensor.T.contiguous() for tensor in grid.per_weight())
    codes = codes.T.contiguous().clone()
    values = (codes - zeros) * scales
    slopes = hessian @ (values - weight.T)
    curvature = hessian.diagonal().clamp(min=torch.finfo(hessian.dtype).tiny)
    free = None if mask is None else mask.T
    largest = 2**grid.bits - 1
    for start in 2 * list(range(0, len(codes), COLUMNS)):
        block = slice(start, min(start + COLUMNS, len(codes)))
        before, here = values[block].clone(), slopes[block].clone()
        for column in range(block.start, block.stop):
            best = values[column] - here[column - start] / curvature[column]
            code = (best / scales[column] + zeros[column]).round_().clamp_(0, largest)
            if free is not None:
                code = torch.where(free[column], code, zeros[column])
            change = (code - codes[column]) * scales[column]
            codes[column] = code
            values[column] += change
            here += hessian[block, column, None] * change
        slopes += hessian[:, block] @ (values[block] - before)
    return codes.T.contiguous()


def fit_scales(weight: Tensor, hessian: Tensor, grid: Grid, codes: Tensor) -> Grid:
    """The scales with which the codes come nearest to the target, the zero points held."""
    size = grid.group_size
    steps = codes - grid.per_weight()[1]
    groups = (-1, steps.shape[1] // size, size)
    curvature = torch.stack(
        [
            ((steps[:, columns] @ hessian[columns]) * steps).view(groups).sum(-1)
            for columns in (slice(start, start + size) for start in range(0, steps.shape[1], size))
        ],
        dim=1,
    )
    right = ((weight @ hessian) * steps).view(groups).sum(-1)
    before = grid.scales.float()
    pull = _PULL * curvature.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    pull = pull.clamp(min=torch.finfo(pull.dtype).tiny)
    scales = torch.linalg.solve(curvature + torch.diag_embed(pull.expand_as(before)), right + pull * before)
    near = (scales > before / _FURTHEST) & (scales < before * _FURTHEST)
    return grid.with_scales(torch.where(near, scales, before))
