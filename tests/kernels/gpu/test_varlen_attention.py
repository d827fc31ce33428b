"""The encoders' attention: its Triton kernel against `reference`, interpreted where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from fastserve_kernels import reference
from fastserve_kernels.gpu import varlen_attention
from fastserve_kernels.gpu.launch import launch_all

pytestmark = pytest.mark.usefixtures("poisoned")

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
HEADS, DIM = 2, 20


def computed(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    device: torch.device,
    window: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    q, k, v, cu_seqlens = (each.to(device) for each in inputs)
    bias = None if bias is None else bias.to(device)
    return varlen_attention.varlen_attention(q, k, v, cu_seqlens, 0.25, window, bias).cpu()


def ragged(lengths: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k and v as a fused product leaves them, and cu_seqlens."""
    torch.manual_seed(0)
    q, k, v = torch.randn(sum(lengths), 3, HEADS, DIM).to(dtype).unbind(1)
    return q, k, v, torch.tensor([0, *accumulate(lengths)])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("window", "farthest"), [(None, None), (9, None), (0, None), (None, 5), (30, 70)])
def test_equals_the_reference(
    dtype: torch.dtype,
    window: int | None,
    farthest: int | None,
    device: torch.device,
    rel_rms: Callable[[Tensor, Tensor], float],
) -> None:
    inputs = ragged([70, 1, 3, 130, 64], dtype)
    bias = None if farthest is None else torch.randn(HEADS, 2 * farthest + 1).to(dtype)
    came = computed(inputs, device, window, bias)
    assert came.dtype == dtype
    assert rel_rms(came, reference.varlen_attention(*inputs, 0.25, window, bias)) < TOLERANCE[dtype]


def test_every_config(device: torch.device, rel_rms: Callable[[Tensor, Tensor], float]) -> None:
    inputs = ragged([5, 90], torch.bfloat16)
    expected = reference.varlen_attention(*inputs, 0.25, None, None)
    for dim in (32, 128):
        for config in varlen_attention.candidates({"dim": dim}):
            out = torch.empty(95, HEADS, DIM, dtype=torch.bfloat16, device=device)
            q, k, v, cu_seqlens = (each.to(device) for each in inputs)
            launch_all(varlen_attention.plan(q, k, v, cu_seqlens, 0.25, None, None, out, config=config))
            assert rel_rms(out.cpu(), expected) < TOLERANCE[torch.bfloat16], config


def test_no_sequences(device: torch.device) -> None:
    assert computed(ragged([], torch.float32), device).shape == (0, HEADS, DIM)
