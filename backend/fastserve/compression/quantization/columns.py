"""Which input columns of a linear to leave out, and how the others make up for it.

With inputs x, the weight whose output is nearest to a wanted y is W* = E[y x^T] P, where P = E[x x^T]^-1. To
leave out the columns B of it adds at least tr(W*_B (P_BB)^-1 W*_B^T) to E||y - W x||^2, reached when those
that remain are solved anew: the optimal brain surgeon (Hassibi and Stork, 1993) for columns, as ZipLM (Kurtic
et al., arXiv 2302.04089) has it for the structures of a model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

AT_ONCE = 0.02
"""The part of the units left that is left out together, between two rankings of them."""
LEAST = 1e-4
"""What is added to the gram for it to have an inverse, relative to the mean of its diagonal."""


@dataclass(frozen=True)
class Regression:
    """Least squares of wanted outputs y from inputs x, held to a weight; float64."""

    cross: Tensor
    """[N, K] E[y x^T]."""
    hessian: Tensor
    """[K, K] E[x x^T]."""
    weight: Tensor
    """[N, K] to which the solution is held."""
    ridge: float
    """By how much: the mean square, in all directions alike, of further inputs whose wanted outputs the
    weight gives."""

    @classmethod
    def towards(cls, weight: Tensor, cross: Tensor, hessian: Tensor, tokens: int) -> Regression:
        """Of means over so many tokens, as if there were K more of the same energy for the weight [N, K]. Few
        tokens change it little then, and many decide: the ridge for a change and a noise of like energy."""
        mean_square = float(hessian.diagonal().mean().clamp_min(1e-30))
        return cls(cross.double(), hessian.double(), weight.double(), len(hessian) / tokens * mean_square)

    def weighed(self, rows: Tensor) -> Regression:
        """The same with outputs that count so much [N]: errors are sums of squares times that."""
        scales = rows.double().sqrt()[:, None]
        return replace(self, cross=scales * self.cross, weight=scales * self.weight)

    def steady_gram(self, ridge: float) -> Tensor:
        """The gram with further inputs."""
        return self.hessian + ridge * torch.eye(
            len(self.hessian), dtype=self.hessian.dtype, device=self.hessian.device
        )

    def solve(self, columns: Tensor) -> Tensor:
        """The best weight [N, len(columns)] float32 of these columns alone."""
        wanted = self.cross[:, columns] + self.ridge * self.weight[:, columns]
        factor = torch.linalg.cholesky(self.steady_gram(self.ridge)[columns][:, columns])
        return torch.cholesky_solve(wanted.T, factor).T.float().contiguous()

    def solve_all(self) -> Tensor:
        """The best weight [N, K] float32."""
        return self.solve(torch.arange(len(self.hessian), device=self.hessian.device))


@dataclass(frozen=True)
class Removal:
    """Units of columns in the order in which to leave them out."""

    order: Tensor
    """[removed] int64: the units, first to go first."""
    errors: Tensor
    """[removed + 1] float64: by how many are gone, what that adds to E||y - W x||^2."""


def removal(regression: Regression, unit: int, count: int) -> Removal:
    """Leaves out `count` units of `unit` neighbouring columns, again and again those that cost least."""
    hessian = regression.steady_gram(LEAST * float(regression.hessian.diagonal().mean()))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian)).float()
    weight = regression.solve_all()
    left = torch.arange(inverse.shape[0] // unit, device=weight.device)
    order, errors = [left[:0]], [torch.zeros(1, dtype=torch.float64, device=weight.device)]
    while count > 0:
        costs = unit_costs(weight, inverse, unit)
        ranked = costs.argsort(stable=True)
        now = min(count, max(1, int(AT_ONCE * len(left))))
        gone, kept = ranked[:now], ranked[now:].sort().values
        order.append(left[gone])
        errors.append(errors[-1][-1] + costs[gone].double().cumsum(0))
        weight, inverse = without(weight, inverse, unit_columns(gone, unit), unit_columns(kept, unit))
        left, count = left[kept], count - now
    return Removal(torch.cat(order), torch.cat(errors))


def kept_units(regression: Regression, unit: int, count: int) -> Tensor:
    """Those that stay [count], ascending, when all others are left out."""
    units = regression.hessian.shape[0] // unit
    stays = torch.ones(units, dtype=torch.bool, device=regression.hessian.device)
    stays[removal(regression, unit, units - count).order] = False
    return stays.nonzero()[:, 0]


def unit_costs(weight: Tensor, inverse: Tensor, unit: int) -> Tensor:
    """What it costs to leave out one unit alone, for each: [units]."""
    if unit == 1:
        return weight.square().sum(0) / inverse.diagonal()
    count = weight.shape[1] // unit
    blocks = torch.stack([inverse[s : s + unit, s : s + unit] for s in range(0, count * unit, unit)])
    columns = weight.reshape(-1, count, unit).permute(1, 2, 0)
    return (columns * torch.linalg.solve(blocks, columns)).sum((1, 2))


def without(weight: Tensor, inverse: Tensor, gone: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The best weight and the inverse gram of the kept columns alone, from those of all."""
    step = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, kept])
    return weight[:, kept] - weight[:, gone] @ step, inverse[kept][:, kept] - inverse[kept][:, gone] @ step


def unit_columns(units: Tensor, unit: int) -> Tensor:
    """The columns [len(units) * unit] of units, or their rows."""
    return (units[:, None] * unit + torch.arange(unit, device=units.device)).flatten()
