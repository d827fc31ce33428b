"""Structured pruning of a linear's input columns: the optimal brain surgeon.

With inputs x, the weight whose output is nearest to a wanted y is W* = E[y x^T] P, where P = E[x x^T]^-1. To
leave out the columns B of it adds at least tr(W*_B (P_BB)^-1 W*_B^T) to E||y - W x||^2, reached when those
that remain are solved anew: the optimal brain surgeon (Hassibi and Stork, 1993) for columns, as ZipLM (Kurtic
et al., arXiv 2302.04089) has it for the structures of a model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastserve.compression.calibration.regression import Regression

AT_ONCE = 0.02
"""The part of the units left that is left out together, between two rankings of them."""
LEAST = 1e-4
"""Damping of the Hessian, relative to the mean of its diagonal, for it to have an inverse."""


@dataclass(frozen=True)
class Removal:
    """Units of columns in the order in which to leave them out."""

    order: Tensor
    """[removed] int64: the units, first to go first."""
    errors: Tensor
    """[removed + 1] float64: by how many are gone, what that adds to E||y - W x||^2."""


def removal_order(regression: Regression, unit: int, count: int) -> Removal:
    """Leaves out `count` units of `unit` neighbouring columns, again and again those that cost least."""
    hessian = regression.damped_hessian(LEAST * float(regression.hessian.diagonal().mean()))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian)).float()
    weight = regression.solve_all()
    left = torch.arange(inverse.shape[0] // unit, device=weight.device)
    order, errors = [left[:0]], [torch.zeros(1, dtype=torch.float64, device=weight.device)]
    while count > 0:
        costs = unit_saliency(weight, inverse, unit)
        ranked = costs.argsort(stable=True)
        now = min(count, max(1, int(AT_ONCE * len(left))))
        gone, kept = ranked[:now], ranked[now:].sort().values
        order.append(left[gone])
        errors.append(errors[-1][-1] + costs[gone].double().cumsum(0))
        weight, inverse = remove_columns(weight, inverse, unit_columns(gone, unit), unit_columns(kept, unit))
        left, count = left[kept], count - now
    return Removal(torch.cat(order), torch.cat(errors))


def kept_units(regression: Regression, unit: int, count: int) -> Tensor:
    """The units that stay [count] int64, ascending, when all others are left out."""
    units = regression.hessian.shape[0] // unit
    stays = torch.ones(units, dtype=torch.bool, device=regression.hessian.device)
    stays[removal_order(regression, unit, units - count).order] = False
    return stays.nonzero()[:, 0]


def unit_saliency(weight: Tensor, inverse: Tensor, unit: int) -> Tensor:
    """The saliency [units] of each unit: the output error of leaving it out alone."""
    if unit == 1:
        return weight.square().sum(0) / inverse.diagonal()
    count = weight.shape[1] // unit
    blocks = torch.stack([inverse[s : s + unit, s : s + unit] for s in range(0, count * unit, unit)])
    columns = weight.reshape(-1, count, unit).permute(1, 2, 0)
    return (columns * torch.linalg.solve(blocks, columns)).sum((1, 2))


def remove_columns(weight: Tensor, inverse: Tensor, gone: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The best weight and the inverse Hessian of the kept columns alone, from those of all."""
    step = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, kept])
    return weight[:, kept] - weight[:, gone] @ step, inverse[kept][:, kept] - inverse[kept][:, gone] @ step


def unit_columns(units: Tensor, unit: int) -> Tensor:
    """The columns (or rows) [len(units) * unit] that units consist of."""
    return (units[:, None] * unit + torch.arange(unit, device=units.device)).flatten()
