"""RMS norms, bound by the bytes they read and write.

bfloat16 on one core of an EPYC 9005, the call included: [1, 576] takes 0.9 us, [16, 576] 3 us; 512 rows on
two cores 33 us.
"""

from __future__ import annotations

from typing import Any

from numba import float32, njit

from fastserve_kernels.cpu.kernels.kernel import Elements, WorkCounter, fetch_add, kernel
from fastserve_kernels.cpu.kernels.vector_math import square_root
from fastserve_kernels.cpu.kernels.vectors import (
    LANES,
    load_masked,
    multiply_add,
    reduce_add,
    round_to,
    splat,
    store_masked,
)

ITEM_ROWS = 4
"""Rows of a work item."""


@njit(error_model="numpy")
def _inverse_rms(squares: Any, dim: int, eps: float) -> Any:
    """A vector of 1 / sqrt(mean + eps), of the squares of a row summed lane by lane."""
    root = square_root(splat(float32(reduce_add(squares) / dim + eps), LANES))
    return splat(float32(1), LANES) / root


@kernel
def rms_norm(
    counter: WorkCounter,
    x: Elements,
    weight: Elements,
    out: Elements,
    rows: int,
    heads: int,
    row_stride: int,
    dim: int,
    eps: float,
) -> None:
    """x [rows, heads, dim], its rows row_stride apart; weight [dim]; out [rows, heads, dim]."""
    first = fetch_add(counter) * ITEM_ROWS
    while first < rows:
        for row in range(first, min(first + ITEM_ROWS, rows)):
            for head in range(heads):
                start = row * row_stride + head * dim
                squares = splat(float32(0), LANES)
                for i in range(0, dim, LANES):
                    part = load_masked(x, start + i, dim - i)
                    squares = multiply_add(part, part, squares)
                scale = _inverse_rms(squares, dim, eps)
                to = (row * heads + head) * dim
                for i in range(0, dim, LANES):
                    normed = round_to(x, load_masked(x, start + i, dim - i) * scale)
                    store_masked(out, to + i, normed * load_masked(weight, i, dim - i), dim - i)
        first = fetch_add(counter) * ITEM_ROWS


@kernel
def add_rms_norm(
    counter: WorkCounter,
    x: Elements,
    residual: Elements,
    weight: Elements,
    out: Elements,
    sums: Elements,
    rows: int,
    dim: int,
    eps: float,
) -> None:
    """sums = x + residual and out = its norm; all [rows, dim], weight [dim]."""
    first = fetch_add(counter) * ITEM_ROWS
    while first < rows:
        for row in range(first, min(first + ITEM_ROWS, rows)):
            start = row * dim
            squares = splat(float32(0), LANES)
            for i in range(0, dim, LANES):
                part = load_masked(x, start + i, dim - i) + load_masked(residual, start + i, dim - i)
                part = round_to(x, part)
                store_masked(sums, start + i, part, dim - i)
                squares = multiply_add(part, part, squares)
            scale = _inverse_rms(squares, dim, eps)
            for i in range(0, dim, LANES):
                normed = round_to(x, load_masked(sums, start + i, dim - i) * scale)
                store_masked(out, start + i, normed * load_masked(weight, i, dim - i), dim - i)
        first = fetch_add(counter) * ITEM_ROWS
