"""Weight formats of one's own, each from one file (`examples/custom_kernel.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastserve_kernels import ops
from fastserve_kernels.formats.prepared import Prepared
from fastserve_kernels.formats.weight import Weight
from fastserve_kernels.formats.weight_io import FORMATS
from fastserve_kernels.preparation import REGISTERED

Prepare = Callable[[Weight, torch.dtype], Prepared]
"""`preparation.prepare` for one format: the weight is on its device already, the dtype is that of the
activations."""


def register_format(
    kind: type[Weight], linear: Callable[..., Tensor], prepare: Prepare | None = None
) -> None:
    """Makes a format known: `prepare` and `ops.linear` take it, and it is stored as `weight_tensors` does.

    `linear(x, *arguments, bias, residual) -> Tensor` multiplies by it, as `ops.linear` says: an operator of
    torch.library, so that torch picks the implementation by the device and can trace it. `prepare` gives the
    weight as `linear` wants it on the device; without it the arguments are those of `kind.arguments`.

    Raises ValueError if there is another format of that name, or another operator of that name.
    """
    if kind.__name__ in FORMATS:
        raise ValueError(f"there is a format {kind.__name__} already: {FORMATS[kind.__name__]}")
    if kind.operator in ops.LINEARS:
        raise ValueError(f"there is an operator {kind.operator} already: {ops.LINEARS[kind.operator]}")
    FORMATS[kind.__name__] = kind
    ops.LINEARS[kind.operator] = linear
    REGISTERED[kind] = prepare or _plain


def _plain(weight: Any, dtype: torch.dtype) -> Prepared:
    return Prepared(weight.operator, weight.arguments, weight.out_features, weight.in_features)
