"""A weight as the kernels of one device read it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Prepared:
    """What `ops.linear` takes; made by `preparation.prepare`, for one device and dtype of activations."""

    operator: str
    """The operator's name in torch.ops.fastserve: "linear_int4"."""
    arguments: tuple[Tensor | int | None, ...]
    """What the operator takes between x and bias, packed for the device."""
    out_features: int
    """N."""
    in_features: int
    """K."""
