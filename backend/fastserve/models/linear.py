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
        """x [T, K]: x W^T + b, [T, N]."""
        return ops.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class MixedFormatLinear:
    """One linear layer whose rows are held in several formats."""

    parts: tuple[Linear, ...]
    """From the first rows to the last."""

    def __call__(self, x: Tensor) -> Tensor:
        """As `Linear`."""
        return torch.cat([part(x) for part in self.parts], dim=1)


AnyLinear = Linear | MixedFormatLinear
