"""The formula of linear quantization, x_int = round((x - x_min) / (x_max - x_min) (2^n - 1)), in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from torch import Tensor

from fastserve.compression.quantization.grid import Grid
from fastserve.compression.quantization.round_to_nearest import Round

GROUP_SIZES: list[Any] = [32, 64, None, "tensor"]


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Finite float32 matrices: any numbers, numbers around a large one, or constants."""
    shape = draw(st.tuples(st.integers(1, 4), st.sampled_from([64, 128])))
    scale = 10.0 ** draw(st.integers(-30, 30))
    kind = draw(st.sampled_from(["any", "normal", "far from 0", "constant"]))
    if kind == "any":
        elements: Any = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)
        return torch.from_numpy(draw(st_numpy.arrays(np.float32, shape, elements=elements)))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(shape)
    if kind == "far from 0":
        x += 1000
    elif kind == "constant":
        x = x[:, :1].expand(shape)
    return x * scale


def exact_grid(x: Tensor, bits: int, symmetric: bool, group_size: Any) -> Grid:
    step = Round(bits=bits, group_size=group_size, symmetric=symmetric, zero_points="exact")
    return step.grid(x, torch.eye(x.shape[1]), torch.float32)


def ranges(shape: torch.Size, group_size: Any) -> list[tuple[slice, slice]]:
    """The elements that share a range."""
    rows, columns = shape
    if group_size == "tensor":
        return [(slice(None), slice(None))]
    size = group_size or columns
    return [(slice(i, i + 1), slice(j, j + size)) for i in range(rows) for j in range(0, columns, size)]


@settings(deadline=None, max_examples=200)
@given(
    x=matrices(),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    group_size=st.sampled_from(GROUP_SIZES),
)
def test_values_are_those_of_the_formula_and_within_half_a_step(
    x: Tensor, bits: int, symmetric: bool, group_size: Any
) -> None:
    grid = exact_grid(x, bits, symmetric, group_size)
    codes = grid.quantize(x)
    assert 0 <= codes.min() <= codes.max() < 2**bits
    values = grid.dequantize(codes).double().numpy()
    for where in ranges(x.shape, group_size):
        part = x.double().numpy()[where]
        largest = np.abs(part).max()
        low, high = (-largest, largest) if symmetric else (part.min(), part.max())
        step = (high - low) / (2**bits - 1)
        rounding = 2**-21 * largest + 2**-126  # of float32, in numbers of that size
        assert (np.abs(values[where] - part) <= step / 2 + rounding).all()
        if step > 0:
            fractions = (part - low) / (high - low) * (2**bits - 1)
            formula = np.round(fractions) * step + low
            is_tie = np.abs(fractions % 1 - 0.5) * step <= rounding
            assert (is_tie | (np.abs(values[where] - formula) <= rounding)).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_group_of_equal_values_is_kept(symmetric: bool) -> None:
    x = torch.full((2, 64), 0.3)
    grid = exact_grid(x, 4, symmetric, None)
    assert torch.equal(grid.dequantize(grid.quantize(x)), x)


def test_zeros_are_kept() -> None:
    x = torch.zeros(1, 32)
    grid = exact_grid(x, 3, True, None)
    assert not grid.dequantize(grid.quantize(x)).any()


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_kernels_format_holds_the_values(bits: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 128)
    x[0] = 0.7
    grid = exact_grid(x, bits, False, 64)
    codes = grid.quantize(x)
    torch.testing.assert_close(grid.pack(codes).dequantize(), grid.dequantize(codes), rtol=1e-5, atol=1e-6)


def test_a_whole_tensor_shares_one_range() -> None:
    grid = exact_grid(torch.arange(128.0).view(2, 64), 7, False, "tensor")
    assert grid.scales.tolist() == [[1.0], [1.0]]
    assert grid.quantize(torch.arange(128.0).view(2, 64)).flatten().tolist() == list(range(128))


def test_a_grid_whose_dtype_would_move_values_is_in_float32() -> None:
    x = 1000 + torch.rand(2, 64)
    step = Round(bits=8, group_size=None, zero_points="exact")
    assert step.grid(x, torch.eye(64), torch.bfloat16).scales.dtype == torch.float32
    assert step.grid(x - 1000, torch.eye(64), torch.bfloat16).scales.dtype == torch.bfloat16
