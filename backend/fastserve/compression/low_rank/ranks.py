"""Rank allocation: the least error for a number of parameters, or the least rank for an error.

A weight [N, K] of rank R has R (N + K) parameters in place of N K: from R = N K / (N + K) on nothing is
saved, and the weight stays dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_HALVINGS = 200
"""Bisections of the range of prices: enough for its width to be nothing in float64."""


@dataclass(frozen=True)
class Options:
    """The ranks that a weight [N, K] may get, by falling number of parameters; the first is to stay dense."""

    ranks: Tensor
    """[options] int64; 0: dense."""
    parameters: Tensor
    """[options] float64."""
    errors: Tensor
    """[options] float64: what the choice is by; 0 for dense."""
    whole: float
    """The error of having no weight at all."""

    @classmethod
    def of(cls, shape: tuple[int, int], squares: Tensor, multiple: int) -> Options:
        """The options of a weight of this shape: ranks are multiples of `multiple`.

        `squares` [min(N, K)] float64 are the squared singular values, largest first; an error is the sum of
        those left out.
        """
        n, k = shape
        largest = (n * k - 1) // (n + k)
        ranks = torch.arange(largest // multiple * multiple, 0, -multiple)
        squares = squares.clamp_min(0)
        left_out = squares.sum() - squares.cumsum(0)
        none, dense = torch.zeros(1, dtype=torch.int64), torch.tensor([float(n * k)], dtype=torch.float64)
        return cls(
            ranks=torch.cat([none, ranks]),
            parameters=torch.cat([dense, ranks.double() * (n + k)]),
            errors=torch.cat([none.double(), left_out[ranks - 1].clamp_min(0)]),
            whole=float(squares.sum()),
        )


def ranks_for_size(options: Mapping[str, Options], part: float) -> dict[str, int]:
    """The rank of each linear, or 0 to stay dense: the least sum of errors with at most this part of all
    their parameters.

    At a price of a parameter each linear chooses for itself; the price is raised until they keep within the
    budget. What that leaves goes, step by step, to those whose error falls most for it.
    """
    budget = part * sum(float(each.parameters[0]) for each in options.values())
    low, high = 1e-300, 1e300
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        if _spent(options, _choices(options, middle)) <= budget:
            high = middle
        else:
            low = middle
    chosen = _choices(options, high)
    rest = budget - _spent(options, chosen)
    while True:
        name = _best_step(options, chosen, rest)
        if name is None:
            return {name: int(each.ranks[chosen[name]]) for name, each in options.items()}
        rest += float(options[name].parameters[chosen[name]] - options[name].parameters[chosen[name] - 1])
        chosen[name] -= 1


def ranks_for_error(options: Mapping[str, Options], error: float) -> dict[str, int]:
    """The least rank of each linear, or 0 to stay dense, whose error is at most this part of the norm of its
    outputs."""
    return {
        name: int(each.ranks[int((each.errors <= error**2 * each.whole).nonzero().max())])
        for name, each in options.items()
    }


def _choices(options: Mapping[str, Options], price: float) -> dict[str, int]:
    return {name: int((each.errors + price * each.parameters).argmin()) for name, each in options.items()}


def _spent(options: Mapping[str, Options], chosen: Mapping[str, int]) -> float:
    return sum(float(options[name].parameters[index]) for name, index in chosen.items())


def _best_step(options: Mapping[str, Options], chosen: Mapping[str, int], rest: float) -> str | None:
    """The linear to which the next larger rank does most good, of those for which it is within the rest."""
    gains = {}
    for name, index in chosen.items():
        each = options[name]
        if index > 0 and (more := float(each.parameters[index - 1] - each.parameters[index])) <= rest:
            gains[name] = float(each.errors[index] - each.errors[index - 1]) / more
    return max(gains, key=gains.__getitem__, default=None)
