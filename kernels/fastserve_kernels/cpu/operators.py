"""The operators on a CPU beside the linears: kernels of our own for what torch has no operator for.

Each kernel is imported and compiled when it is first run: numba takes half a second, which nobody need wait
for who runs none.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from fastserve_kernels.attention_metadata import Batch
from fastserve_kernels.kv_cache import KVCache

if TYPE_CHECKING:
    from fastserve_kernels.cpu.kernels.kernel import Kernel

MIN_PARALLEL = 16 * 1024
"""Elements that are worth a second thread: it takes a microsecond to get one."""
MIN_PARALLEL_KEYS = 128
"""Queries times keys that are."""
QUANTIZED_CACHES = (torch.int8, torch.float8_e4m3fn)
"""The dtypes of caches that have scales."""
UNLIMITED = 1 << 40
"""The sliding window of attention that has none."""


@functools.cache
def _rms_norm_kernel(dtype: torch.dtype) -> Kernel:
    from fastserve_kernels.cpu.kernels.norms import rms_norm

    return rms_norm(dtype)


@functools.cache
def _add_rms_norm_kernel(dtype: torch.dtype) -> Kernel:
    from fastserve_kernels.cpu.kernels.norms import add_rms_norm

    return add_rms_norm(dtype)


@functools.cache
def _swiglu_kernel(dtype: torch.dtype) -> Kernel:
    from fastserve_kernels.cpu.kernels.swiglu import swiglu

    return swiglu(dtype)


@functools.cache
def _write_kv_kernel(dtype: torch.dtype, stored: torch.dtype) -> Kernel:
    from fastserve_kernels.cpu.kernels.rotary import write_kv

    return write_kv(dtype, stored)


@functools.cache
def _rotary_write_kv_kernel(dtype: torch.dtype, stored: torch.dtype) -> Kernel:
    from fastserve_kernels.cpu.kernels.rotary import rotary_write_kv

    return rotary_write_kv(dtype, stored)


@functools.cache
def _paged_attention_kernel(dtype: torch.dtype, stored: torch.dtype) -> Kernel:
    from fastserve_kernels.cpu.kernels.attention import paged_attention

    return paged_attention(dtype, stored)


def _with_tokens_whole(x: Tensor) -> Tensor:
    """x [T, D] or [T, H, D], copied unless the elements of each token lie together, in order."""
    if x.is_contiguous():
        return x
    within = x.stride()[1:]
    return x if within == (1,) or within == (x.shape[-1], 1) else x.contiguous()


def _refuse(dtype: torch.dtype, **others: Tensor) -> NoReturn:
    """Operands of another dtype would be read as what they are not."""
    wrong = {name: other.dtype for name, other in others.items() if other.dtype != dtype}
    name, came = next(iter(wrong.items()))
    raise ValueError(f"{name} must be {dtype} as the first operand is, not {came}")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`ops.rms_norm`. Raises ValueError if an operand has another dtype than the first."""
    if weight.dtype != x.dtype:
        _refuse(x.dtype, weight=weight)
    x, weight = _with_tokens_whole(x), weight.contiguous()
    out = x.new_empty(*x.shape)
    _rms_norm_kernel(x.dtype)(
        x.numel() >= MIN_PARALLEL,
        x.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        x.shape[1] if x.dim() == 3 else 1,
        x.stride(0),
        x.shape[-1],
        eps,
    )
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`ops.add_rms_norm`. Raises ValueError if an operand has another dtype than the first."""
    if not x.dtype == residual.dtype == weight.dtype:
        _refuse(x.dtype, residual=residual, weight=weight)
    x, residual, weight = x.contiguous(), residual.contiguous(), weight.contiguous()
    out, total = x.new_empty(*x.shape), x.new_empty(*x.shape)
    _add_rms_norm_kernel(x.dtype)(
        x.numel() >= MIN_PARALLEL,
        x.data_ptr(),
        residual.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        total.data_ptr(),
        x.shape[0],
        x.shape[1],
        eps,
    )
    return out, total


def swiglu(gate_up: Tensor) -> Tensor:
    """`ops.swiglu`."""
    gate_up = gate_up.contiguous()
    tokens, dim = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, dim)
    _swiglu_kernel(gate_up.dtype)(
        out.numel() >= MIN_PARALLEL, gate_up.data_ptr(), out.data_ptr(), tokens, dim
    )
    return out


def _addresses(cache: KVCache) -> tuple[int, int, int, int]:
    """0 for a scale that is not there."""
    keys, values, k_scale, v_scale = cache
    if k_scale is None or v_scale is None:
        return keys.data_ptr(), values.data_ptr(), 0, 0
    return keys.data_ptr(), values.data_ptr(), k_scale.data_ptr(), v_scale.data_ptr()


def _check_cache(dtype: torch.dtype, cache: KVCache) -> None:
    """Raises ValueError unless the kernels for activations of that dtype can take it."""
    keys, values, k_scale, v_scale = cache
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError(
            f"k_cache and v_cache must be contiguous, but have strides {keys.stride()} {values.stride()}"
        )
    stored = keys.dtype
    if values.dtype != stored:
        raise ValueError(f"v_cache must be {stored} as k_cache is, not {values.dtype}")
    if stored in QUANTIZED_CACHES:
        _check_scale("k_scale", k_scale, keys)
        _check_scale("v_scale", v_scale, values)
    elif stored != dtype:
        allowed = " or ".join(map(str, (dtype, *QUANTIZED_CACHES)))
        raise ValueError(f"k_cache and v_cache must be {allowed} beside activations of {dtype}, not {stored}")
    elif k_scale is not None or v_scale is not None:
        raise ValueError(f"k_scale and v_scale must be None for caches of {stored}")


def _check_scale(name: str, scale: Tensor | None, cache: Tensor) -> None:
    heads = cache.shape[2]
    if scale is None:
        came = "None"
    elif scale.dtype != torch.float32 or scale.shape != (heads,) or not scale.is_contiguous():
        came = f"{scale.dtype} {list(scale.shape)} with strides {scale.stride()}"
    else:
        return
    raise ValueError(
        f"{name} must be contiguous torch.float32 [{heads}], one for each key head of a {cache.dtype} cache, "
        f"not {came}"
    )


def write_kv(k: Tensor, v: Tensor, cache: KVCache, slot_mapping: Tensor) -> None:
    """`ops.write_kv`. Raises ValueError if operands have several dtypes, or the cache is unfit."""
    if v.dtype != k.dtype:
        _refuse(k.dtype, v=v)
    _check_cache(k.dtype, cache)
    k, v, slot_mapping = _with_tokens_whole(k), _with_tokens_whole(v), slot_mapping.contiguous()
    _write_kv_kernel(k.dtype, cache.keys.dtype)(
        k.numel() >= MIN_PARALLEL,
        k.data_ptr(),
        v.data_ptr(),
        *_addresses(cache),
        slot_mapping.data_ptr(),
        *k.shape,
        v.shape[2],
        k.stride(0),
        v.stride(0),
    )


def rotary_write_kv(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, cache: KVCache, slot_mapping: Tensor
) -> Tensor:
    """`ops.rotary_write_kv`. Raises ValueError as `write_kv` does."""
    if not q.dtype == k.dtype == v.dtype == cos.dtype == sin.dtype:
        _refuse(q.dtype, k=k, v=v, cos=cos, sin=sin)
    _check_cache(q.dtype, cache)
    q, k, v = _with_tokens_whole(q), _with_tokens_whole(k), _with_tokens_whole(v)
    cos, sin, slot_mapping = cos.contiguous(), sin.contiguous(), slot_mapping.contiguous()
    tokens, heads, dim = q.shape
    out = q.new_empty(*q.shape)
    _rotary_write_kv_kernel(q.dtype, cache.keys.dtype)(
        out.numel() >= MIN_PARALLEL,
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        out.data_ptr(),
        *_addresses(cache),
        slot_mapping.data_ptr(),
        tokens,
        heads,
        k.shape[1],
        dim,
        v.shape[2],
        cos.shape[1],
        q.stride(0),
        k.stride(0),
        v.stride(0),
    )
    return out


def paged_attention(
    q: Tensor, cache: KVCache, batch: Batch, scale: float, sliding_window: int | None, softcap: float | None
) -> Tensor:
    """`ops.paged_attention`. Raises ValueError if the cache is unfit for q's dtype."""
    _check_cache(q.dtype, cache)
    q = _with_tokens_whole(q)
    query_start, context_lens, block_tables = batch
    tokens, heads, dim = q.shape
    _, block_size, kv_heads, dim_v = cache.values.shape
    sequences, table_width = block_tables.shape
    out = q.new_empty(tokens, heads, dim_v)
    _paged_attention_kernel(q.dtype, cache.keys.dtype)(
        tokens * table_width * block_size >= MIN_PARALLEL_KEYS,
        q.data_ptr(),
        *_addresses(cache),
        out.data_ptr(),
        query_start.data_ptr(),
        context_lens.data_ptr(),
        block_tables.data_ptr(),
        sequences,
        table_width,
        block_size,
        heads,
        kv_heads,
        dim,
        dim_v,
        q.stride()[0],
        UNLIMITED if sliding_window is None else sliding_window,
        scale,
        0.0 if softcap is None else softcap,
    )
    return out
