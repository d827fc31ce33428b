"""Bias correction: the bias gives back what rounding a weight takes from the mean of the output."""

from __future__ import annotations

from torch import Tensor


def corrected_bias(bias: Tensor, before: Tensor, after: Tensor, mean: Tensor) -> Tensor:
    """b + (W - W') E[x]: the mean of the output [N] stays what it was (Nagel et al., arXiv 1906.04721).

    The weights are [N, K], before and after; `mean` [K] is that of the inputs.
    """
    return bias + (before - after) @ mean
