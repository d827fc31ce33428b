"""The operators on a CPU: oneDNN's products, and kernels of our own for what torch has no operator for."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastserve_kernels.cpu_kernels.kernel import Kernel

WIDEST_SINGLE_ROW = 1024
"""oneDNN adds up a wider single row in another order than several rows; rounding hides most of it."""

LEAST_PARALLEL = 16 * 1024
"""Elements that are worth a second thread: it takes a microsecond to get one."""
LEAST_PARALLEL_KEYS = 128
"""Queries times keys that are."""
UNLIMITED = 1 << 40
"""The sliding window of attention that has none."""


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """x [T, K] by a weight in oneDNN's blocked layout. The residual is added after rounding, as transformers
    does; fused into the product it takes as long."""
    if x.shape[0] == 1 and x.shape[1] > WIDEST_SINGLE_ROW:
        y = torch.ops.mkldnn._linear_pointwise(x.expand(2, -1), weight, bias, "none", [], "")[:1]
    else:
        y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y if residual is None else y.add_(residual)


@functools.cache
def _kernel(name: str, dtype: torch.dtype) -> Kernel:
    """Imports numba, which nobody need wait for who runs no kernel on a CPU, and compiles the kernel."""
    from fastserve_kernels.cpu_kernels import attention, rotary, rows

    modules = {"paged_attention": attention, "rotary_write_kv": rotary}
    kernel: Kernel = getattr(modules.get(name, rows), name)(dtype)
    return kernel


def _with_tokens_whole(x: Tensor) -> Tensor:
    """x [T, D] or [T, H, D], copied unless the elements of each token lie together, in order."""
    within = x.stride()[1:]
    return x if within == (1,) or within == (x.shape[-1], 1) else x.contiguous()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = _with_tokens_whole(x)
    out = x.new_empty(x.shape)
    _kernel("rms_norm", x.dtype)(
        x.numel() >= LEAST_PARALLEL,
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
    x, residual = x.contiguous(), residual.contiguous()
    out, total = x.new_empty(x.shape), x.new_empty(x.shape)
    _kernel("add_rms_norm", x.dtype)(
        x.numel() >= LEAST_PARALLEL,
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
    gate_up = gate_up.contiguous()
    tokens, dim = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, dim)
    _kernel("swiglu", gate_up.dtype)(
        out.numel() >= LEAST_PARALLEL, gate_up.data_ptr(), out.data_ptr(), tokens, dim
    )
    return out


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    for new, cache in ((k, k_cache), (v, v_cache)):
        finite = torch.nan_to_num(new, 0.0, 0.0, 0.0)
        cache.flatten(0, 1).index_copy_(0, slot_mapping, finite.to(cache.dtype))


def _check_caches(k_cache: Tensor, v_cache: Tensor, dtype: torch.dtype) -> None:
    for cache in (k_cache, v_cache):
        if cache.dtype != dtype or not cache.is_contiguous():
            raise ValueError(f"a cache must be contiguous {dtype}, not {cache.dtype} of {cache.stride()}")


def rotary_write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    _check_caches(k_cache, v_cache, q.dtype)
    q, k, v = _with_tokens_whole(q), _with_tokens_whole(k), _with_tokens_whole(v)
    cos, sin = cos.contiguous(), sin.contiguous()
    tokens, heads, dim = q.shape
    out = q.new_empty(q.shape)
    _kernel("rotary_write_kv", q.dtype)(
        out.numel() >= LEAST_PARALLEL,
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        out.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
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
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    _check_caches(k_cache, v_cache, q.dtype)
    q = _with_tokens_whole(q)
    tokens, heads, dim = q.shape
    _, block_size, kv_heads, dim_v = v_cache.shape
    sequences, table_width = block_tables.shape
    out = q.new_empty(tokens, heads, dim_v)
    _kernel("paged_attention", q.dtype)(
        tokens * table_width * block_size >= LEAST_PARALLEL_KEYS,
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
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
        q.stride(0),
        UNLIMITED if sliding_window is None else sliding_window,
        scale,
        0.0 if softcap is None else softcap,
    )
    return out
