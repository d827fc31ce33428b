"""Where the tests of the Triton kernels run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fastserve_kernels import reference
from fastserve_kernels.formats import Weight
from fastserve_kernels.gpu.launch import Config, Launch, launch_all
from fastserve_kernels.gpu.operator import Operator, Shape
from fastserve_kernels.gpu.registry import IMPLEMENTATIONS, PREPARE

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
"""By the activations' dtype, how far a product may be from that in float32 (`rel_rms`)."""

CheckProduct = Callable[..., None]
CheckCandidates = Callable[..., None]


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


@pytest.fixture
def check_product(product: Callable[..., Tensor], rel_rms: Callable[[Tensor, Tensor], float]) -> CheckProduct:
    """Asserts that the product by a weight on the device is that in float32, but for rounding."""

    def check(weight: Weight, x: Tensor, *added: Tensor) -> None:
        """`added`: bias and residual."""
        came = product(weight, x, *added)
        wanted = x.float() @ weight.dequantize().t() + sum(tensor.float() for tensor in added)
        assert came.dtype == x.dtype
        assert rel_rms(came, wanted) < TOLERANCE[x.dtype]

    return check


@pytest.fixture
def check_candidates(device: torch.device, rel_rms: Callable[[Tensor, Tensor], float]) -> CheckCandidates:
    """Asserts that tuning has at most 16 configs to try at a shape, and that each gives the right result."""

    def check(
        operator: Operator, shape: Shape, also: Callable[[Config, list[Launch]], None] | None = None
    ) -> None:
        """`also` asserts what else there is of a config's launches, when they have run."""
        *inputs, out = operator.inputs(shape, torch.float16, device)
        assert operator.reference is not None
        wanted = operator.reference(*inputs, out)
        configs = operator.candidates(shape)
        assert len(configs) <= 16
        for config in configs:
            came = torch.full_like(out, torch.nan)
            launches = operator.plan(*inputs, came, config=config)
            launch_all(launches)
            assert rel_rms(came, wanted) < TOLERANCE[torch.float16], config
            if also is not None:
                also(config, launches)

    return check
