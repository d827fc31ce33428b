"""A weight as the kernels of one device read it, arranged once, at load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastserve_kernels.formats import Dense
from fastserve_kernels.formats.weight import FLOATS, Weight, name_of
from fastserve_kernels.implementations import GPU_MODULES, cpu_module, gpu_module


@dataclass(frozen=True, eq=False)
class Prepared:
    """What `ops.linear` takes; made by `prepare`, and good for one device and dtype of activations."""

    operator: str
    """As in torch.ops.fastserve: "linear_int4"."""
    arguments: tuple[Tensor | int | None, ...]
    """What the operator takes between x and bias, in the arrangement of the device."""
    out_features: int
    """N."""
    in_features: int
    """K."""


ARRANGEMENTS: dict[str, Callable[[Weight, torch.dtype], Prepared]] = {}
"""Those of the formats that `registration` was told of, by their operator."""


def prepare(weight: Weight, device: torch.device | str, dtype: torch.dtype) -> Prepared:
    """Arranges a weight for activations of this dtype on this device; the weight itself stays as it is.

    On a CPU and on a GPU of NVIDIA each format has an arrangement of its own, or that of another which holds
    the same numbers; any other device multiplies by the plain tensors, dequantized at each call. Weights that
    are floats are rounded to the dtype.

    Raises ValueError if the dtype is not float32, float16 or bfloat16, or the device cannot multiply by this
    weight, with the reason; ImportError if the device is a GPU and the package triton is not installed.
    """
    device = torch.device(device)
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be float32, float16 or bfloat16, not {name_of(dtype)}")
    operator = weight.operator
    if operator in ARRANGEMENTS:
        return ARRANGEMENTS[operator](weight.to(device), dtype)
    if device.type == "cpu":
        kind = "dense" if operator == "linear" else operator.removeprefix("linear_")
        arrange: Callable[..., Prepared] = getattr(cpu_module("linear"), f"prepare_{kind}")
        return arrange(weight.to(device), dtype)
    if device.type == "cuda" and operator in GPU_MODULES:
        arrange = gpu_module(operator).prepare
        return arrange(weight, device, dtype)
    plain = weight.to(device)
    if isinstance(plain, Dense):  # torch's own product takes one dtype
        plain = Dense(plain.weight.to(dtype))
    return Prepared(operator, plain.arguments, plain.out_features, plain.in_features)
