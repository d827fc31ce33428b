"""What is particular to the CPU's kernels: threads, rounding, and what they cannot take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastserve_kernels import cpu, ops

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def results(batch: Any) -> list[Tensor]:
    """Of all kernels, on inputs as large as the batch's queries."""
    dtype, tokens = batch.q.dtype, len(batch.q)
    torch.manual_seed(1)
    x, residual = torch.randn(2, tokens, 576).to(dtype)
    weight, gate_up = torch.randn(576).to(dtype), torch.randn(tokens, 1000).to(dtype)
    cos, sin = torch.randn(2, tokens, 64).to(dtype)
    k, v = torch.randn(2, tokens, 3, 64).to(dtype)
    caches = batch.k_cache.clone(), batch.v_cache.clone()
    return [
        ops.rms_norm(x, weight, 1e-5),
        *ops.add_rms_norm(x, residual, weight, 1e-5),
        ops.swiglu(gate_up),
        ops.rotary_write_kv(batch.q, k, v, cos, sin, *caches, batch.meta.slot_mapping),
        *caches,
        ops.paged_attention(batch.q, *caches, batch.meta, 0.125),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_make_no_difference(
    dtype: torch.dtype, make_batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch([1, 150, 1, 70], [20, 150, 300, 100], dtype=dtype)
    monkeypatch.setattr(cpu, "LEAST_PARALLEL", 1)
    monkeypatch.setattr(cpu, "LEAST_PARALLEL_KEYS", 1)
    in_parallel = results(batch)
    monkeypatch.setattr(cpu, "LEAST_PARALLEL", 1 << 40)
    monkeypatch.setattr(cpu, "LEAST_PARALLEL_KEYS", 1 << 40)
    for came, wanted in zip(in_parallel, results(batch), strict=True):
        assert torch.equal(came, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_round_as_those_of_torch(dtype: torch.dtype) -> None:
    """Halves to even, into infinity, and what is not a number."""
    limits = torch.finfo(dtype)
    numbers = [0.0, -0.0, 1.0, limits.eps / 2, limits.eps, 1 + limits.eps, limits.max, limits.tiny]
    numbers += [-number for number in numbers] + [float("inf"), float("-inf"), float("nan")]
    x = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    pairs = torch.cartesian_prod(x, x)
    _, total = ops.add_rms_norm(pairs[:, :1], pairs[:, 1:], torch.ones(1, dtype=dtype), 1e-5)
    assert torch.equal(total.nan_to_num(7.0), (pairs[:, :1] + pairs[:, 1:]).nan_to_num(7.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_far_out(dtype: torch.dtype) -> None:
    gate = torch.tensor([[-200.0, -88.0, -20.0, 0.0, 20.0, 88.0, 200.0]]).to(dtype)
    came = ops.swiglu(torch.cat((gate, torch.ones_like(gate)), 1))
    assert torch.allclose(came, torch.nn.functional.silu(gate), rtol=2e-6, atol=1e-30)
    nothing = torch.full((1, 2), float("nan"), dtype=dtype)
    assert ops.swiglu(nothing).isnan().all()


def test_caches_of_another_kind_are_refused(make_batch: Any) -> None:
    batch = make_batch([1], [20])
    other = batch.k_cache.bfloat16(), batch.v_cache.bfloat16()
    apart = batch.k_cache.transpose(0, 1), batch.v_cache.transpose(0, 1)
    for caches in (other, apart):
        with pytest.raises(ValueError, match="must be contiguous"):
            ops.paged_attention(batch.q, *caches, batch.meta, 0.125)
