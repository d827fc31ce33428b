"""Norms and SwiGLU: kernels that go over rows, bound by the bytes they read and write.

Each row is read in LANES; what is left of it at the end, one by one into a vector whose other lanes are 0.
"""

from __future__ import annotations

from fastserve_kernels.cpu_kernels.kernel import Elements, Work, claim, kernel
from fastserve_kernels.cpu_kernels.vectors import (
    LANES,
    exp,
    load,
    load_some,
    round_to,
    splat,
    square_root,
    store,
    store_some,
    total,
)
from numba import float32

PIECE = 16
"""Rows that a thread takes at a time."""


@kernel
def rms_norm(
    work: Work,
    x: Elements,
    weight: Elements,
    out: Elements,
    rows: int,
    heads: int,
    x_stride: int,
    dim: int,
    eps: float,
) -> None:
    """x [rows, heads, dim], rows x_stride elements apart; weight [dim]; out [rows, heads, dim]."""
