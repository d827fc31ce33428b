"""What is particular to the CPU's kernels: threads, rounding, and what they cannot take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastserve_kernels import ops
from fastserve_kernels.cpu import operators as cpu
from fastserve_kernels.kv_cache import KVCache

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def results(batch: Any, cache_dtype: torch.dtype) -> list[Tensor]:
    """The results of all kernels, on inputs as large as the batch's queries."""
    dtype, tokens = batch.q.dtype, len(batch.q)
    torch.manual_seed(1)
    x, residual = torch.randn(2, tokens, 576).to(dtype)
    weight, gate_up = torch.randn(576).to(dtype), torch.randn(tokens, 1000).to(dtype)
    cos, sin = torch.randn(2, tokens, 64).to(dtype)
    k, v = torch.randn(2, tokens, 3, 64).to(dtype)
    caches = batch.k_cache.to(cache_dtype, copy=True), batch.v_cache.to(cache_dtype, copy=True)
    cache = KVCache(*caches, *(() if cache_dtype == dtype else torch.rand(2, 3) / 100 + 0.01))
    return [
        ops.rms_norm(x, weight, 1e-5),
        *ops.add_rms_norm(x, residual, weight, 1e-5),
        ops.swiglu(gate_up),
        ops.rotary_write_kv(batch.q, k, v, cos, sin, cache, batch.meta.slot_mapping),
        *(stored.view(torch.uint8) for stored in caches),
        ops.paged_attention(batch.q, cache, batch.meta, 0.125),
    ]


@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [
        *((dtype, dtype) for dtype in DTYPES),
        (torch.bfloat16, torch.int8),
        (torch.bfloat16, torch.float8_e4m3fn),
    ],
)
def test_threads_make_no_difference(
    dtype: torch.dtype, cache_dtype: torch.dtype, make_batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch([1, 150, 1, 70], [20, 150, 300, 100], dtype=dtype)
    monkeypatch.setattr(cpu, "MIN_PARALLEL", 1)
    monkeypatch.setattr(cpu, "MIN_PARALLEL_KEYS", 1)
    in_parallel = results(batch, cache_dtype)
    monkeypatch.setattr(cpu, "MIN_PARALLEL", 1 << 40)
    monkeypatch.setattr(cpu, "MIN_PARALLEL_KEYS", 1 << 40)
    for came, wanted in zip(in_parallel, results(batch, cache_dtype), strict=True):
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


Caches = tuple[Tensor, Tensor]


def bad_caches(k: Tensor, v: Tensor) -> dict[str, tuple[Caches, tuple[Tensor | None, Tensor | None]]]:
    """Caches and scales that the kernels for float32 refuse, each by a part of what they say."""
    ones = torch.ones(k.shape[2])
    int8 = torch.zeros(k.shape, dtype=torch.int8), torch.zeros(v.shape, dtype=torch.int8)
    fp8 = int8[0].to(torch.float8_e4m3fn), int8[1].to(torch.float8_e4m3fn)
    return {
        "must be torch.float32 or torch.int8": ((k.bfloat16(), v.bfloat16()), (None, None)),
        "not torch.float64": ((k.double(), v.double()), (None, None)),
        "must be contiguous": ((k.transpose(0, 1), v.transpose(0, 1)), (None, None)),
        "v_cache must be torch.float32 as k_cache": ((k, int8[1]), (ones, ones)),
        "must be None for caches of torch.float32": ((k, v), (None, ones)),
        "k_scale must .* torch.int8 cache, not None": (int8, (None, ones)),
        "v_scale must .* torch.float8_e4m3fn cache, not None": (fp8, (ones, None)),
        r"k_scale must .* \[3\], .* not torch.float64": (int8, (ones.double(), ones)),
        r"v_scale must .* \[3\], .* not torch.float32 \[2\]": (fp8, (ones, ones[:2])),
        r"k_scale must .* not torch.float32 \[3, 1\]": (int8, (ones[:, None], ones)),
        r"v_scale must be contiguous .* strides \(2,\)": (int8, (ones, torch.ones(6)[::2])),
    }


def test_caches_of_another_kind_are_refused(make_batch: Any) -> None:
    batch = make_batch([1], [20])
    q, slots = batch.q, batch.meta.slot_mapping
    k = v = torch.randn(1, 3, 64)
    cos, sin = torch.randn(2, 1, 64)
    for message, (caches, scales) in bad_caches(batch.k_cache, batch.v_cache).items():
        cache = KVCache(*caches, *scales)
        with pytest.raises(ValueError, match=message):
            ops.paged_attention(q, cache, batch.meta, 0.125)
        with pytest.raises(ValueError, match=message):
            ops.rotary_write_kv(q, k, v, cos, sin, cache, slots)
        with pytest.raises(ValueError, match=message):
            ops.write_kv(k, v, cache, slots)


def test_operands_of_another_dtype_are_refused(make_batch: Any) -> None:
    """They would be read as what they are not."""
    x, half, weight = torch.randn(2, 8), torch.randn(2, 8).half(), torch.randn(8)
    with pytest.raises(ValueError, match=r"weight must be torch.float16 as the first operand is"):
        ops.rms_norm(half, weight, 1e-5)
    with pytest.raises(ValueError, match=r"residual must be torch.float32 .* not torch.float16"):
        ops.add_rms_norm(x, half, weight, 1e-5)
    with pytest.raises(ValueError, match=r"swiglu takes .* not torch.int8"):
        ops.swiglu(torch.ones(2, 8, dtype=torch.int8))
    batch = make_batch([1], [20])
    k, angle, slots = torch.randn(1, 3, 64), torch.randn(1, 64), batch.meta.slot_mapping
    cache = batch.cache()
    with pytest.raises(ValueError, match=r"cos must be torch.float32"):
        ops.rotary_write_kv(batch.q, k, k, angle.half(), angle, cache, slots)
    with pytest.raises(ValueError, match=r"v must be torch.float32"):
        ops.write_kv(k, k.half(), cache, slots)
