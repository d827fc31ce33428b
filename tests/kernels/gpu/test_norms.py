"""RMS norm's Triton kernels against `reference`, interpreted where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastserve_kernels import reference
from fastserve_kernels.gpu import norms
from fastserve_kernels.gpu.launch import launch_all

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def rounds_like(came: Tensor, wanted: Tensor) -> bool:
    """Whether all is equal but for sums that differ in float32's last places, which turns few roundings."""
    came, eps = came.cpu(), torch.finfo(came.dtype).eps
    if came.dtype == torch.float32:
        return torch.allclose(came, wanted, rtol=4 * eps, atol=1e-6)
    close = torch.allclose(came.float(), wanted.float(), rtol=2 * eps)
    return close and int((came != wanted).sum()) <= 1 + came.numel() // 1000


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), [(0, 64), (1, 1), (5, 31), (3, 576), (2, 4100)])
def test_equals_the_reference(rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
    x, residual = torch.randn(2, rows, dim).to(dtype)
    weight = torch.randn(dim).to(dtype)
    given = x.to(device), residual.to(device)
    factor = weight.to(device)
    assert rounds_like(norms.rms_norm(given[0], factor, 1e-5), reference.rms_norm(x, weight, 1e-5))
    normed, total = norms.add_rms_norm(*given, factor, 1e-5)
    wanted, wanted_total = reference.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total.cpu(), wanted_total)
    assert rounds_like(normed, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_and_rows_that_lie_apart(dtype: torch.dtype, device: torch.device) -> None:
    fused, weight = torch.randn(7, 12, 64).to(dtype), torch.randn(64).to(dtype)
    came = norms.rms_norm(fused.to(device)[:, 3:9], weight.to(device), 1e-6)
    assert rounds_like(came, reference.rms_norm(fused[:, 3:9], weight, 1e-6))
    rows = fused[:, 2]
    normed, total = norms.add_rms_norm(rows.to(device), fused.to(device)[:, 4], weight.to(device), 1e-6)
    assert torch.equal(total.cpu(), rows + fused[:, 4])
    assert rounds_like(normed, reference.rms_norm(total.cpu(), weight, 1e-6))


def test_every_config(device: torch.device) -> None:
    for shape in norms.COMPILED_SHAPES:
        x, residual = torch.randn(2, 5, shape["dim"]).bfloat16()
        weight = torch.randn(shape["dim"]).bfloat16()
        wanted, _ = reference.add_rms_norm(x, residual, weight, 1e-5)
        for config in norms.candidates(shape):
            total, out = torch.empty(2, 5, shape["dim"], dtype=torch.bfloat16, device=device)
            given = x.to(device), residual.to(device), weight.to(device)
            launch_all(norms.plan_add_rms_norm(*given, 1e-5, total, out, config=config))
            assert rounds_like(out, wanted), config
