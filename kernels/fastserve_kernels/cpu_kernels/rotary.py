"""Rotary embedding of a step's queries and keys, and the way of its keys and values into the cache: bound by
the bytes."""

from __future__ import annotations

from numba import njit

from fastserve_kernels.cpu_kernels.kernel import Elements, Integers, Work, claim, kernel
from fastserve_kernels.cpu_kernels.vectors import LANES, finite, load_part, round_to, store_part

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
    k_cache: Elements,
    v_cache: Elements,
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
    [slots, kv_heads, dim or dim_v]."""
    first = claim(work) * PIECE
    while first < tokens:
        for token in range(first, min(first + PIECE, tokens)):
            angle = token * rotary_dim
            start = token * heads
            for head in range(heads):
                to = (start + head) * dim
                _rotate(q, token * q_stride + head * dim, cos, sin, angle, rotary_dim, out, to, dim, False)
            start = slots[token] * kv_heads
            for head in range(kv_heads):
                to = (start + head) * dim
                _rotate(k, token * k_stride + head * dim, cos, sin, angle, rotary_dim, k_cache, to, dim, True)
                _copy(v, token * v_stride + head * dim_v, v_cache, (start + head) * dim_v, dim_v, True)
        first = claim(work) * PIECE


@njit(error_model="numpy")
def _rotate(
    x: Elements,
    start: int,
    cos: Elements,
    sin: Elements,
    angle: int,
    rotary_dim: int,
    out: Elements,
    to: int,
    dim: int,
    scrub: bool,
) -> None:
    """One head; both products are rounded, and so is their sum. With scrub, what is not finite becomes 0."""
    half = rotary_dim // 2
    for i in range(0, half, LANES):
        count = half - i
        low, high = load_part(x, start + i, count), load_part(x, start + half + i, count)
        turned = round_to(x, low * load_part(cos, angle + i, count)) - round_to(
            x, high * load_part(sin, angle + i, count)
        )
        store_part(out, to + i, finite(turned) if scrub else turned, count)
        turned = round_to(x, high * load_part(cos, angle + half + i, count)) + round_to(
            x, low * load_part(sin, angle + half + i, count)
        )
        store_part(out, to + half + i, finite(turned) if scrub else turned, count)
    _copy(x, start + rotary_dim, out, to + rotary_dim, dim - rotary_dim, scrub)


@njit(error_model="numpy")
def _copy(x: Elements, start: int, out: Elements, to: int, count: int, scrub: bool) -> None:
    for i in range(0, count, LANES):
        part = load_part(x, start + i, count - i)
        store_part(out, to + i, finite(part) if scrub else part, count - i)
