"""Norms, SwiGLU, rotary embedding and the cache's writes against `reference`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from fastserve_kernels import ops, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def rounds_like(came: Tensor, wanted: Tensor) -> bool:
    """Whether all is equal but for sums and exponentials that differ in float32's last place, which here and
    there turns a rounding."""
    if came.dtype == torch.float32:
        return torch.allclose(came, wanted, rtol=2e-6, atol=1e-6)
    close = torch.allclose(came.float(), wanted.float(), rtol=2 * torch.finfo(came.dtype).eps)
    return close and int((came != wanted).sum()) <= 1 + came.numel() // 1000


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 5, 33])
@pytest.mark.parametrize("dim", [1, 31, 576, 4096])
def test_rms_norm_rounds_like_that_of_transformers(rows: int, dim: int, dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(dim, eps=1e-5).to(dtype)
    norm.weight.copy_(torch.randn(dim))
    x, residual = torch.randn(rows, dim).to(dtype), torch.randn(rows, dim).to(dtype)
    assert rounds_like(ops.rms_norm(x, norm.weight, 1e-5), norm(x))
    normed, total = ops.add_rms_norm(x, residual, norm.weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert rounds_like(normed, norm(x + residual))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_heads_that_lie_apart(dtype: torch.dtype) -> None:
    x = torch.randn(7, 12, 64).to(dtype)[:, 3:9]
    weight = torch.randn(64).to(dtype)
    assert rounds_like(ops.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 17])
def test_swiglu(rows: int, dtype: torch.dtype, rel_rms: Callable[[Tensor, Tensor], float]) -> None:
    gate_up = torch.randn(rows, 2 * 77).to(dtype)
    gate, up = gate_up.double().chunk(2, -1)
    assert rel_rms(ops.swiglu(gate_up), gate * torch.sigmoid(gate) * up) < TOLERANCE[dtype]
    assert rounds_like(ops.swiglu(gate_up), reference.swiglu(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary_dim", [64, 32, 2])
@pytest.mark.parametrize("tokens", [0, 1, 19])
def test_rotary(
    tokens: int, rotary_dim: int, dtype: torch.dtype, rel_rms: Callable[[Tensor, Tensor], float]
) -> None:
    q, k, _ = torch.randn(tokens, 15, 64).to(dtype).split([9, 3, 3], dim=1)
    cos, sin = torch.randn(2, tokens, rotary_dim).to(dtype)
    wanted = reference.rotary(q.double(), k.double(), cos.double(), sin.double())
    for came, want in zip(ops.rotary(q, k, cos, sin), wanted, strict=True):
        assert came.dtype == dtype
        assert rel_rms(came, want) < TOLERANCE[dtype]


def test_rotary_is_that_of_transformers(rel_rms: Callable[[Tensor, Tensor], float]) -> None:
    q, k = torch.randn(5, 4, 16), torch.randn(5, 2, 16)
    angle = torch.randn(5, 8)
    cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
    wanted = apply_rotary_pos_emb(q[None].transpose(1, 2), k[None].transpose(1, 2), cos[None], sin[None])
    for came, want in zip(ops.rotary(q, k, cos, sin), wanted, strict=True):
        assert rel_rms(came, want[0].transpose(0, 1)) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 19])
def test_rotary_write_kv_is_rotary_then_write_kv(tokens: int, dtype: torch.dtype) -> None:
    q, k = torch.randn(tokens, 9, 64).to(dtype), torch.randn(tokens, 3, 64).to(dtype)
    v = torch.randn(tokens, 3, 40).to(dtype)
    cos, sin = torch.randn(2, tokens, 64).to(dtype)
    slots = torch.randperm(5 * 8)[:tokens]
    caches = torch.zeros(5, 8, 3, 64, dtype=dtype), torch.zeros(5, 8, 3, 40, dtype=dtype)
    rotated = ops.rotary_write_kv(q, k, v, cos, sin, *caches, slots)
    wanted_q, wanted_k = ops.rotary(q, k, cos, sin)
    wanted = torch.zeros(5 * 8, 3, 64, dtype=dtype), torch.zeros(5 * 8, 3, 40, dtype=dtype)
    wanted[0][slots], wanted[1][slots] = wanted_k, v
    assert torch.equal(rotated, wanted_q)
    assert torch.equal(caches[0].flatten(0, 1), wanted[0])
    assert torch.equal(caches[1].flatten(0, 1), wanted[1])


@pytest.mark.parametrize("implementation", [ops.write_kv, reference.write_kv])
def test_the_cache_stays_finite(implementation: Callable[..., None]) -> None:
    caches = torch.ones(2, 4, 1, 2), torch.ones(2, 4, 1, 2)
    bad = torch.tensor([[[float("nan"), 2.0]], [[float("inf"), -float("inf")]]])
    implementation(bad, bad, *caches, torch.tensor([6, 1]))
    for cache in caches:
        assert cache[1, 2].tolist() == [[0.0, 2.0]]
        assert cache[0, 1].tolist() == [[0.0, 0.0]]
        assert cache.sum() == 14.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_depend_on_the_others(dtype: torch.dtype) -> None:
    x, weight = torch.randn(70, 576).to(dtype), torch.randn(576).to(dtype)
    gate_up = torch.randn(70, 3072).to(dtype)
    q, k = torch.randn(70, 9, 64).to(dtype), torch.randn(70, 3, 64).to(dtype)
    cos, sin = torch.randn(2, 70, 64).to(dtype)
    for row in (0, 1, 33, 69):
        one = slice(row, row + 1)
        assert torch.equal(ops.rms_norm(x[one], weight, 1e-5), ops.rms_norm(x, weight, 1e-5)[one])
        assert torch.equal(ops.swiglu(gate_up[one]), ops.swiglu(gate_up)[one])
        alone = ops.rotary(q[one], k[one], cos[one], sin[one])
        for came, wanted in zip(alone, ops.rotary(q, k, cos, sin), strict=True):
            assert torch.equal(came, wanted[one])
