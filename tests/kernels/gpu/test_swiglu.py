"""SwiGLU's Triton kernel against `reference`, interpreted where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastserve_kernels import reference
from fastserve_kernels.gpu import swiglu
from fastserve_kernels.gpu.launch import launch_all

pytestmark = pytest.mark.usefixtures("poisoned")

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}
"""Where float32's last place turns a rounding, here and there."""


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("tokens", "dim"), [(0, 8), (1, 1), (17, 77), (3, 1536), (2, 2500)])
def test_equals_the_reference(
    tokens: int,
    dim: int,
    dtype: torch.dtype,
    rel_rms: Callable[[Tensor, Tensor], float],
    device: torch.device,
) -> None:
    gate_up = torch.randn(tokens, 2 * dim).to(dtype) * 3
    came = swiglu.swiglu(gate_up.to(device)).cpu()
    assert came.dtype == dtype
    assert rel_rms(came, reference.swiglu(gate_up)) < TOLERANCE[dtype]


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # 1 / (1 + inf) is 0
def test_gates_of_any_size(device: torch.device) -> None:
    gate = torch.tensor([-1e4, -100.0, 100.0, 1e4])
    came = swiglu.swiglu(torch.cat((gate, torch.ones(4)))[None].to(device)).cpu()
    assert came[0].tolist() == [0.0, pytest.approx(0.0, abs=1e-30), 100.0, 1e4]


def test_strided_rows(device: torch.device, rel_rms: Callable[[Tensor, Tensor], float]) -> None:
    gate_up = torch.randn(6, 200)
    came = swiglu.swiglu(gate_up.to(device)[::2, 20:180]).cpu()
    assert rel_rms(came, reference.swiglu(gate_up[::2, 20:180])) < 1e-6


def test_every_config(device: torch.device, rel_rms: Callable[[Tensor, Tensor], float]) -> None:
    gate_up = torch.randn(3, 2 * 1500).bfloat16()
    for config in swiglu.candidates({"tokens": 3, "dim": 1500}):
        out = torch.empty(3, 1500, dtype=torch.bfloat16, device=device)
        launch_all(swiglu.plan(gate_up.to(device), out, config=config))
        assert rel_rms(out.cpu(), reference.swiglu(gate_up)) < TOLERANCE[torch.bfloat16], config
