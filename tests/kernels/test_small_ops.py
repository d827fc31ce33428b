"""Norms, SwiGLU, rotary embedding and the cache's writes against `reference`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from fastserve_kernels import ops, reference
from fastserve_kernels.kv_cache import KVCache

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
QUANTIZED = [torch.int8, torch.float8_e4m3fn]


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
@pytest.mark.parametrize("rows", [1, 2, 3, 16, 17, 64])
def test_norms_are_near_the_exact_ones(
    rows: int, dtype: torch.dtype, rel_rms: Callable[[Tensor, Tensor], float]
) -> None:
    """Also of columns of a wider tensor."""
    x, residual = torch.randn(2, rows, 200).to(dtype)[:, :, 3:180]
    weight = torch.randn(2, 177).to(dtype).t()[:, 0]

    def exact(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()

    assert rel_rms(ops.rms_norm(x, weight, 1e-5), exact(x.double())) < TOLERANCE[dtype]
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert rel_rms(total, x.double() + residual.double()) < TOLERANCE[dtype]
    assert rel_rms(normed, exact(total.double())) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_heads_that_lie_apart(dtype: torch.dtype) -> None:
    x = torch.randn(7, 12, 64).to(dtype)[:, 3:9]
    weight = torch.randn(64).to(dtype)
    assert rounds_like(ops.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 16, 17, 64])
@pytest.mark.parametrize("dim", [1, 77, 160])
def test_swiglu(rows: int, dim: int, dtype: torch.dtype, rel_rms: Callable[[Tensor, Tensor], float]) -> None:
    """The operands are columns of a wider tensor."""
    gate_up = torch.randn(rows, 2 * dim + 5).to(dtype)[:, 2:-3]
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


@dataclass
class Step:
    """Tokens whose heads lie apart, and the caches and slots that their keys and values are for."""

    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    slots: Tensor
    cache: KVCache

    @classmethod
    def random(
        cls, tokens: int, dims: tuple[int, int], rotary_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype
    ) -> Step:
        heads, kv_heads, blocks, block_size = 9, 3, 7, 8
        q, k, _ = torch.randn(tokens, heads + 2 * kv_heads, dims[0]).to(dtype).split([9, 3, 3], dim=1)
        slots = torch.randperm(blocks * block_size).repeat_interleave(2)[::2][:tokens]
        k_scale, v_scale = torch.rand(2, kv_heads) / 100 + 0.01 if cache_dtype in QUANTIZED else (None, None)
        return cls(
            q=q,
            k=k,
            v=torch.randn(tokens, kv_heads + 1, dims[1]).to(dtype)[:, 1:],
            cos=torch.randn(tokens, rotary_dim).to(dtype),
            sin=torch.randn(tokens, rotary_dim).to(dtype),
            slots=slots,
            cache=KVCache(
                torch.randn(blocks, block_size, kv_heads, dims[0]).to(cache_dtype),
                torch.randn(blocks, block_size, kv_heads, dims[1]).to(cache_dtype),
                k_scale,
                v_scale,
            ),
        )


def cloned(cache: KVCache) -> KVCache:
    return cache._replace(keys=cache.keys.clone(), values=cache.values.clone())


CACHES = [(dtype, cache_dtype) for dtype in DTYPES for cache_dtype in (dtype, *QUANTIZED)]


@pytest.mark.parametrize(("dtype", "cache_dtype"), CACHES)
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 16, 17, 50])
@pytest.mark.parametrize(
    ("dims", "rotary_dim"), [((64, 40), 64), ((80, 80), 20), ((33, 7), 6), ((128, 96), 2)]
)
def test_the_cache_is_written(
    dims: tuple[int, int], rotary_dim: int, tokens: int, dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    """To the bit as by the reference; and nothing but the slots that are meant."""
    step = Step.random(tokens, dims, rotary_dim, dtype, cache_dtype)
    turned = (step.q, step.k, step.v, step.cos, step.sin)
    came, wanted = cloned(step.cache), cloned(step.cache)
    rotated = ops.rotary_write_kv(*turned, came, step.slots)
    assert torch.equal(rotated, reference.rotary_write_kv(*turned, wanted, step.slots))
    for one, other, before in zip(came[:2], wanted[:2], step.cache[:2], strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
        assert tokens == 0 or not torch.equal(one.view(torch.uint8), before.view(torch.uint8))
    ops.write_kv(step.k, step.v, came, step.slots)
    reference.write_kv(step.k, step.v, wanted, step.slots)
    for one, other in zip(came[:2], wanted[:2], strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("cache_dtype", QUANTIZED)
def test_quantized_numbers_round_to_the_nearest(cache_dtype: torch.dtype) -> None:
    """Halves to even, tiny ones, and what lies beyond the largest: compared with torch's own rounding."""
    halves = torch.arange(-600, 600) / 4
    tiny = torch.arange(-600, 600) / 2**13
    bits = torch.randint(-(2**31), 2**31, (20_000,)).to(torch.int32).view(torch.float32)
    x = torch.cat((halves, tiny, bits)).view(-1, 1, 1)
    one = torch.ones(1)
    empty = torch.zeros(len(x), 1, 1, 1, dtype=cache_dtype)
    came, wanted = (cloned(KVCache(empty, empty, one, one)) for _ in range(2))
    ops.write_kv(x, -x, came, torch.arange(len(x)))
    reference.write_kv(x, -x, wanted, torch.arange(len(x)))
    for cache, other in zip(came[:2], wanted[:2], strict=True):
        assert torch.equal(cache.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("implementation", [ops.write_kv, reference.write_kv])
def test_the_cache_stays_finite(implementation: Callable[..., None]) -> None:
    caches = torch.ones(2, 4, 1, 2), torch.ones(2, 4, 1, 2)
    bad = torch.tensor([[[float("nan"), 2.0]], [[float("inf"), -float("inf")]]])
    implementation(bad, bad, KVCache(*caches), torch.tensor([6, 1]))
    for cache in caches:
        assert cache[1, 2].tolist() == [[0.0, 2.0]]
        assert cache[0, 1].tolist() == [[0.0, 0.0]]
        assert cache.sum() == 14.0


@pytest.mark.parametrize(("dtype", "cache_dtype"), CACHES)
def test_keys_that_become_infinite_as_they_are_turned_are_0(
    dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    """Numbers that only rounding makes infinite too."""
    step = Step.random(2, (64, 64), 64, dtype, cache_dtype)
    largest = torch.finfo(dtype).max
    step.k.fill_(largest)
    step.cos.fill_(1.0)
    step.sin[0], step.sin[1] = -1.0, torch.finfo(dtype).eps
    step.v[0], step.v[1] = float("-inf"), float("nan")
    rotated = (step.q, step.k, step.v, step.cos, step.sin)
    ops.rotary_write_kv(*rotated, step.cache, step.slots)
    k, v = (cache.flatten(0, 1)[step.slots].float() for cache in step.cache[:2])
    assert k.isfinite().all()
    assert (k == 0).any()
    assert (v == 0).all()


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
