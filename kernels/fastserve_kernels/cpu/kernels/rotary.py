"""Rotary embedding of a step's queries and keys, and the way of its keys and values into the cache: bound by
the bytes."""

from __future__ import annotations

from typing import Any

from numba import float32, njit

from fastserve_kernels.cpu.kernels.kernel import Elements, Floats, Integers, Stored, Work, claim, kernel
from fastserve_kernels.cpu.kernels.vectors import (
    LANES,
    finite,
    is_quantized,
    load_part,
    round_to,
    splat,
    store_part,
)

PIECE = 4
"""Tokens that a thread takes at a time."""


@kernel
def rotary_write_kv(
    work: Work,
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
    first = claim(work) * PIECE
    while first < tokens:
        for token in range(first, min(first + PIECE, tokens)):
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
        first = claim(work) * PIECE


@kernel
def write_kv(
    work: Work,
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
    """As `rotary_write_kv`, of keys that are as they should be."""
    first = claim(work) * PIECE
    while first < tokens:
        for token in range(first, min(first + PIECE, tokens)):
            for head in range(kv_heads):
                place = slots[token] * kv_heads + head
                scale = _scale(k_cache, k_scales, head)
                _copy(k, token * k_stride + head * dim, k_cache, place * dim, dim, True, scale)
                scale = _scale(v_cache, v_scales, head)
                _copy(v, token * v_stride + head * dim_v, v_cache, place * dim_v, dim_v, True, scale)
        first = claim(work) * PIECE


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
    scrub: bool,
    scale: Any,
) -> None:
    """One head; both products are rounded, and so is their sum."""
    half = rotary_dim // 2
    for i in range(0, half, LANES):
        count = half - i
        low, high = load_part(x, start + i, count), load_part(x, start + half + i, count)
        turned = round_to(x, low * load_part(cos, angle + i, count)) - round_to(
            x, high * load_part(sin, angle + i, count)
        )
        _put(x, turned, out, to + i, count, scrub, scale)
        turned = round_to(x, high * load_part(cos, angle + half + i, count)) + round_to(
            x, low * load_part(sin, angle + half + i, count)
        )
        _put(x, turned, out, to + half + i, count, scrub, scale)
    _copy(x, start + rotary_dim, out, to + rotary_dim, dim - rotary_dim, scrub, scale)


@njit(error_model="numpy")
def _copy(x: Elements, start: int, out: Stored, to: int, count: int, scrub: bool, scale: Any) -> None:
    for i in range(0, count, LANES):
        _put(x, load_part(x, start + i, count - i), out, to + i, count - i, scrub, scale)


@njit(error_model="numpy")
def _put(x: Elements, part: Any, out: Stored, to: int, count: int, scrub: bool, scale: Any) -> None:
    """Part of a head of x's dtype, to a cache or elsewhere. With scrub, what is not finite becomes 0."""
    if scrub:
        part = finite(x, part)
    if is_quantized(out):
        part = round_to(x, part) / splat(scale, LANES)
    store_part(out, to, part, count)
