"""What the commands `compile`, `tune` and `bench` must know about an operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastserve_kernels.gpu.launch import Config, Launch

Shape = Mapping[str, int]
"""The sizes that a config is tuned for, by name: m, n, k, group_size; batch, context, heads, ..."""


@dataclass(frozen=True)
class Cost:
    """The least that must be done: what a measured time is compared with."""

    bytes: int
    """Read and written in device memory, each input read once, each output written once."""
    flops: int


@dataclass(frozen=True)
class Operator:
    """An operator whose kernels are compiled ahead, tuned and measured."""

    name: str
    """The operator's name in torch.ops.fastserve."""
    inputs: Callable[[Shape, torch.dtype, torch.device], Any]
    """Random arguments of `plan` for a shape; the weight packed as `prepare` packs it."""
    plan: Callable[..., list[Launch]]
    """plan(*inputs, config=...): the launches, in order. The last argument of the inputs is the output."""
    candidates: Callable[[Shape], list[Config]]
    """The configs that tuning tries for a shape, the one to take untuned first."""
    cost: Callable[[Shape, torch.dtype], Cost]
    compiled_shapes: tuple[Shape, ...]
    """Small shapes, one for each way that `plan` may go, with which each config is compiled ahead."""
    reference: Callable[..., Tensor] | None = None
    """reference(*inputs): the output in float32 by torch alone. None: the config taken first is the judge."""
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    """Dtypes of the activations. bfloat16 and float16 are the main paths: no register may be spilled
    there."""
