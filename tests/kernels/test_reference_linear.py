"""The products of `reference` against those in double, of what the formats stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastserve_kernels import formats, reference
from fastserve_kernels.formats import Weight
from fastserve_kernels.kv_cache import KVCache

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def widths(rows: int) -> Tensor:
    """Bits from 2 to 8."""
    return 2 + torch.arange(rows, dtype=torch.uint8) % 7


FORMATS: dict[str, Callable[[Tensor], Weight]] = {
    "dense": formats.Dense,
    "int4": lambda weight: formats.Int4.pack(weight, 32),
    "int4 with zeros": lambda weight: formats.Int4.pack(weight, None, symmetric=False),
    "int8": formats.Int8.pack,
    "int8 with zeros": lambda weight: formats.Int8.pack(weight, 64, symmetric=False),
    "int rows": lambda weight: formats.IntRows.pack(weight, widths(len(weight)), 64, symmetric=False),
    "nf4": formats.NF4.pack,
    "fp8": formats.FP8.pack,
    "sparse24": formats.Sparse24.pack,
    "sparse24 int4": lambda weight: formats.Sparse24Int4.pack(weight, 64),
    "block sparse": lambda weight: formats.BlockSparse.pack(weight, (16, 32), 0.5),
    "bitmap": lambda weight: formats.Bitmap.pack(weight, density=0.5),
    "low rank": lambda weight: formats.LowRank(weight[:20], weight[:, :20] * 5),
}


def product(x: Tensor, weight: Weight, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    function: Callable[..., Tensor] = getattr(reference, weight.operator)
    return function(x, weight.arguments, bias, residual)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("biased", "added"), [(False, False), (True, False), (False, True), (True, True)])
def test_equals_the_product_in_double(
    name: str, dtype: torch.dtype, biased: bool, added: bool, rel_rms: Callable[[Tensor, Tensor], float]
) -> None:
    weight = FORMATS[name]((torch.randn(48, 192) / 14).to(dtype))
    for rows in (0, 1, 3, 17):
        x = torch.randn(192, 2 * rows).to(dtype).T[::2]
        bias = torch.randn(48).to(dtype) if biased else None
        residual = torch.randn(rows, 96).to(dtype)[:, ::2] if added else None
        wanted = x.double() @ weight.dequantize().double().T
        wanted = wanted if bias is None else wanted + bias.double()
        wanted = wanted if residual is None else wanted + residual.double()
        came = product(x, weight, bias, residual)
        assert came.dtype == dtype
        assert rel_rms(came, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_w8a8_multiplies_integers(dtype: torch.dtype, rel_rms: Callable[[Tensor, Tensor], float]) -> None:
    weight = formats.W8A8.pack(torch.randn(40, 300))
    x = torch.randn(5, 300).to(dtype)
    x[2] = 0
    bias, residual = torch.randn(40).to(dtype), torch.randn(5, 40).to(dtype)
    came = product(x, weight, bias, residual)
    for row in range(5):
        step = x[row].float().abs().max() / 127
        rounded = [round(float(value / step)) if step else 0 for value in x[row].float()]
        total = torch.tensor(rounded) @ weight.values.long().T
        wanted = total * step.double() * weight.scales.double() + bias.double() + residual[row].double()
        assert rel_rms(came[row], wanted) < TOLERANCE[dtype]
    assert rel_rms(product(x, weight, None, None)[:2], x[:2].double() @ weight.dequantize().double().T) < 0.02


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_quantized_cache_holds_what_its_scales_say(dtype: torch.dtype) -> None:
    k, v = torch.randn(2, 3, 2, 8)
    k[0, 0, 0], k[1, 1, 1], v[2, 1, 0] = 1e6, float("nan"), float("-inf")
    k_scale, v_scale = torch.tensor([0.02, 0.5]), torch.tensor([0.01, 0.03])
    k_cache, v_cache = torch.ones(2, 2, 4, 2, 8).to(dtype)
    slots = torch.tensor([5, 0, 6])
    reference.write_kv(k, v, KVCache(k_cache, v_cache, k_scale, v_scale), slots)
    largest = 127 if dtype == torch.int8 else 448
    for cache, new, scale in zip((k_cache, v_cache), (k, v), (k_scale, v_scale), strict=True):
        flat = cache.float().flatten(0, 1)
        wanted = torch.where(new.isfinite(), new / scale[:, None], 0).clamp(-largest, largest)
        error = (flat[slots] - wanted).abs()
        assert (error <= (0.5 if dtype == torch.int8 else wanted.abs() / 16 + 2**-10)).all()
        untouched = [slot for slot in range(8) if slot not in slots.tolist()]
        assert (flat[untouched] == 1).all()
    assert k_cache.float().max() == largest


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_attention_over_a_quantized_cache(dtype: torch.dtype, make_batch: Any) -> None:
    batch = make_batch([1, 4, 20], [37, 4, 50], heads=(6, 2))
    k_scale, v_scale = torch.tensor([0.04, 0.02]), torch.tensor([0.01, 0.03])
    k_cache, v_cache = ((c * 20).round().clamp(-100, 100).to(dtype) for c in (batch.k_cache, batch.v_cache))
    cache = KVCache(k_cache, v_cache, k_scale, v_scale)
    came = reference.paged_attention(batch.q, cache, batch.layout, 0.125, 9, None)
    plain = KVCache(k_cache.float() * k_scale[:, None], v_cache.float() * v_scale[:, None])
    wanted = reference.paged_attention(batch.q, plain, batch.layout, 0.125, 9, None)
    torch.testing.assert_close(came, wanted)
