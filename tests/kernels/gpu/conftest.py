"""Where the tests of the Triton kernels run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fastserve_kernels import reference
from fastserve_kernels.formats import Weight
from fastserve_kernels.gpu.registry import IMPLEMENTATIONS, PREPARE


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one and TRITON_INTERPRET is unset or 0; else the CPU, interpreted."""
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    return torch.device("cpu" if interpreted or not torch.cuda.is_available() else "cuda")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Tensors that are made empty are full of NaN, or of the largest whole number: outputs and partial
    results that are not written, or read where they are not, show."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def product(device: torch.device) -> Callable[..., Tensor]:
    """The product by a weight on the device, the way `ops.linear` goes there, brought back to the CPU."""

    def multiply(
        weight: Weight,
        x: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        prepared = PREPARE[type(weight)](weight, device, x.dtype)
        linear = IMPLEMENTATIONS[getattr(reference, prepared.operator)]
        added = (None if tensor is None else tensor.to(device) for tensor in (bias, residual))
        y: Tensor = linear(x.to(device), prepared.arguments, *added)
        return y.cpu()

    return multiply
