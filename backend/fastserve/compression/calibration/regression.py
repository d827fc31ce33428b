"""Ridge regression of a linear's outputs on its inputs, from second moments.

With inputs x, the weight whose output is nearest to a wanted y is W* = E[y x^T] E[x x^T]^-1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


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
    """The ridge: the mean square, in all directions alike, of further inputs whose wanted outputs the weight
    gives."""

    @classmethod
    def towards(cls, weight: Tensor, cross: Tensor, hessian: Tensor, tokens: int) -> Regression:
        """A regression from means over so many tokens, with K further tokens of the same energy that speak
        for the weight [N, K]. Few tokens change it little then, and many decide: the ridge for a change and a
        noise of like energy."""
        mean_square = float(hessian.diagonal().mean().clamp_min(1e-30))
        return cls(cross.double(), hessian.double(), weight.double(), len(hessian) / tokens * mean_square)

    def weighted(self, rows: Tensor) -> Regression:
        """This regression with weighted outputs: squared errors are multiplied by `rows` [N]."""
        scales = rows.double().sqrt()[:, None]
        return replace(self, cross=scales * self.cross, weight=scales * self.weight)

    def damped_hessian(self, ridge: float) -> Tensor:
        """The Hessian [K, K] with `ridge` added to its diagonal."""
        return self.hessian + ridge * torch.eye(
            len(self.hessian), dtype=self.hessian.dtype, device=self.hessian.device
        )

    def solve(self, columns: Tensor) -> Tensor:
        """The best weight [N, len(columns)] float32 of these columns alone."""
        wanted = self.cross[:, columns] + self.ridge * self.weight[:, columns]
        factor = torch.linalg.cholesky(self.damped_hessian(self.ridge)[columns][:, columns])
        return torch.cholesky_solve(wanted.T, factor).T.float().contiguous()

    def solve_all(self) -> Tensor:
        """The best weight [N, K] float32."""
        return self.solve(torch.arange(len(self.hessian), device=self.hessian.device))
