"""Linear layers of a decoder, on weights that are arranged for the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastserve_kernels import ops
from fastserve_kernels.formats.prepared import Prepared


@dataclass(frozen=True)
class Linear:
    """A weight [N, K] and its bias [N]."""

    weight: Prepared
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K]: x W^T + b, [T, N], in the dtype of x."""
        return ops.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class MixedFormatLinear:
    """A linear layer whose rows are held in several formats, as in a checkpoint that gives each its own."""

    parts: tuple[Linear, ...]
    """The linear layers whose rows lie one below the other, the first ones first."""

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K]: x W^T + b, [T, N]."""
        return torch.cat([part(x) for part in self.parts], dim=1)


AnyLinear = Linear | MixedFormatLinear
