"""A thread's memory for float32, aligned to lines of the cache."""

from __future__ import annotations

from typing import Any

from numba import float32, njit, types

from fastserve_kernels.cpu.kernels.kernel import Floats

LINE = 64
"""Bytes of a line of the cache."""

_aligned_alloc: Any = types.ExternalFunction("aligned_alloc", types.CPointer(float32)(types.intp, types.intp))
_free: Any = types.ExternalFunction("free", types.void(types.CPointer(float32)))


@njit(error_model="numpy")
def round_up(number: int, multiple: int) -> int:
    """The least multiple that is not below the number."""
    return (number + multiple - 1) // multiple * multiple


@njit(error_model="numpy")
def allocate_floats(count: int) -> Floats:
    """A pointer to `count` float32, to be freed by `free_floats`."""
    return _aligned_alloc(LINE, round_up(4 * count, LINE))


@njit(error_model="numpy")
def free_floats(pointer: Floats) -> None:
    """Frees what `allocate_floats` allocated."""
    _free(pointer)
