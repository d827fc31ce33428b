"""Rotary embedding of a step's queries and keys, and the way of its keys and values into the cache: bound by
the bytes."""

from __future__ import annotations

from typing import Any

from numba import float32, njit

from fastserve_kernels.cpu.kernels.kernel import (
    Elements,
    Floats,
    Integers,
    Stored,
    WorkCounter,
    fetch_add,
    kernel,
)
from fastserve_kernels.cpu.kernels.vectors import (
    LANES,
    is_quantized,
    load_masked,
    round_to,
    splat,
    store_masked,
    zero_nonfinite,
)

ITEM_TOKENS = 4
"""Tokens of a work item."""


@kernel
def rotary_write_kv(
    counter: WorkCounter,
    q: Elements,
    k: Elements,
    v: Elements,
    cos: Elements,
    sin: Elements,
    out: Elements,
    k_cache: Stored,
    v_cache: Stored,
    k_scales: Floats,
    v_scales: Floats,
    slots: Integers,
    tokens: int,
    heads: int,
    kv_heads: int,
    dim: int,
    dim_v: int,
    rotary_dim: int,
    q_stride: int,
    k_stride: int,
    v_stride: int,
) -> None:
    """q [tokens, heads, dim], k [tokens, kv_heads, dim] and v [tokens, kv_heads, dim_v], their tokens as far
    apart as the strides say; cos and sin [tokens, rotary_dim]; out [tokens, heads, dim]; caches
    [slots, kv_heads, dim or dim_v]; scales [kv_heads], which are read for quantized caches alone."""
    one = float32(1)
    first = fetch_add(counter) * ITEM_TOKENS
    while first < tokens:
        for token in range(first, min(first + ITEM_TOKENS, tokens)):
            angle = token * rotary_dim
            start = token * heads
            for head in range(heads):
                to = (start + head) * dim
                _rotate(
                    q, token * q_stride + head * dim, cos, sin, angle, rotary_dim, out, to, dim, False, one
                )
            start = slots[token] * kv_heads
            for head in range(kv_heads):
                scale = _scale(k_cache, k_scales, head)
                to = (start + head) * dim
                here = token * k_stride + head * dim
                _rotate(k, here, cos, sin, angle, rotary_dim, k_cache, to, dim, True, scale)
                scale = _scale(v_cache, v_scales, head)
                to = (start + head) * dim_v
                _copy(v, token * v_stride + head * dim_v, v_cache, to, dim_v, True, scale)
        first = fetch_add(counter) * ITEM_TOKENS


@kernel
def write_kv(
    counter: WorkCounter,
    k: Elements,
    v: Elements,
    k_cache: Stored,
    v_cache: Stored,
    k_scales: Floats,
    v_scales: Floats,
    slots: Integers,
    tokens: int,
    kv_heads: int,
    dim: int,
    dim_v: int,
    k_stride: int,
    v_stride: int,
) -> None:
    """Stores k and v in the caches, k without a rotation; shapes as in `rotary_write_kv`."""
    first = fetch_add(counter) * ITEM_TOKENS
    while first < tokens:
        for token in range(first, min(first + ITEM_TOKENS, tokens)):
            for head in range(kv_heads):
                place = slots[token] * kv_heads + head
                scale = _scale(k_cache, k_scales, head)
                _copy(k, token * k_stride + head * dim, k_cache, place * dim, dim, True, scale)
                scale = _scale(v_cache, v_scales, head)
                _copy(v, token * v_stride + head * dim_v, v_cache, place * dim_v, dim_v, True, scale)
        first = fetch_add(counter) * ITEM_TOKENS


@njit(error_model="numpy")
def _scale(cache: Stored, scales: Floats, head: int) -> Any:
    return scales[head] if is_quantized(cache) else float32(1)


@njit(error_model="numpy")
def _rotate(
    x: Elements,
    start: int,
    cos: Elements,
    sin: Elements,
    angle: int,
    rotary_dim: int,
    out: Stored,
    to: int,
    dim: int,
    drop_nonfinite: bool,
    scale: Any,
) -> None:
    """One head; both products are rounded, and so is their sum."""
    half = rotary_dim // 2
    for i in range(0, half, LANES):
        count = half - i
        low, high = load_masked(x, start + i, count), load_masked(x, start + half + i, count)
        rotated = round_to(x, low * load_masked(cos, angle + i, count)) - round_to(
            x, high * load_masked(sin, angle + i, count)
        )
        _store(x, rotated, out, to + i, count, drop_nonfinite, scale)
        rotated = round_to(x, high * load_masked(cos, angle + half + i, count)) + round_to(
            x, low * load_masked(sin, angle + half + i, count)
        )
        _store(x, rotated, out, to + half + i, count, drop_nonfinite, scale)
    _copy(x, start + rotary_dim, out, to + rotary_dim, dim - rotary_dim, drop_nonfinite, scale)


@njit(error_model="numpy")
def _copy(
    x: Elements, start: int, out: Stored, to: int, count: int, drop_nonfinite: bool, scale: Any
) -> None:
    for i in range(0, count, LANES):
        _store(x, load_masked(x, start + i, count - i), out, to + i, count - i, drop_nonfinite, scale)


@njit(error_model="numpy")
def _store(
    x: Elements, part: Any, out: Stored, to: int, count: int, drop_nonfinite: bool, scale: Any
) -> None:
    """Part of a head of x's dtype, to a cache or elsewhere. With drop_nonfinite, what is not finite becomes
    0."""
    if drop_nonfinite:
        part = zero_nonfinite(x, part)
    if is_quantized(out):
        part = round_to(x, part) / splat(scale, LANES)
    store_masked(out, to, part, count)
