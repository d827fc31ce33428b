"""The formula of linear quantization, against the same in numpy and in fractions."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from torch import Tensor

from fastserve.compression.quantization.uniform import GroupSize, Uniform, quantize

GROUP_SIZES: list[GroupSize] = [32, 64, None, "tensor"]


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


def by_numpy(x: Tensor, bits: int, symmetric: bool, group_size: GroupSize) -> np.ndarray:
    """Codes to values by the formula, range by range."""
    result = np.empty(x.shape)
    values = x.double().numpy()
    rows, columns = x.shape
    if group_size == "tensor":
        ranges = [(slice(None), slice(None))]
    else:
        size = group_size or columns
        ranges = [(slice(i, i + 1), slice(j, j + size)) for i in range(rows) for j in range(0, columns, size)]
    for where in ranges:
        part = values[where]
        low, high = part.min(), part.max()
        if symmetric:
            low, high = -np.abs(part).max(), np.abs(part).max()
        if low == high:
            result[where] = part
            continue
        codes = np.round((part - low) / (high - low) * (2**bits - 1))
        result[where] = codes * ((high - low) / (2**bits - 1)) + low
    return result


@settings(deadline=None, max_examples=200)
@given(
    x=matrices(),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    group_size=st.sampled_from(GROUP_SIZES),
)
def test_values_are_those_of_the_formula_and_within_half_a_step(
    x: Tensor, bits: int, symmetric: bool, group_size: GroupSize
) -> None:
    quantized = quantize(x, bits, symmetric, group_size)
    assert int(quantized.codes.max()) < 2**bits
    assert np.array_equal(quantized.dequantize().numpy(), by_numpy(x, bits, symmetric, group_size))
    steps = quantized.scales.repeat_interleave(x.numel() // quantized.scales.numel()).view(x.shape)
    largest = x.double().abs().max()
    assert ((quantized.dequantize() - x.double()).abs() <= 0.5 * steps * (1 + 1e-9) + 1e-14 * largest).all()


@settings(deadline=None)
@given(st.lists(st.integers(-999, 999), min_size=2, max_size=20), st.integers(2, 8))
def test_codes_of_whole_numbers_are_rounded_as_fractions_are(numbers: list[int], bits: int) -> None:
    low, high = min(numbers), max(numbers)
    codes = quantize(torch.tensor([numbers]).float(), bits).codes[0].tolist()
    for number, code in zip(numbers, codes, strict=True):
        exact = Fraction(number - low, high - low) * (2**bits - 1) if high > low else Fraction(0)
        assert abs(exact - code) <= Fraction(1, 2)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_group_of_equal_values_is_kept(symmetric: bool) -> None:
    x = torch.full((2, 64), 0.3)
    assert torch.equal(quantize(x, 4, symmetric).dequantize().float(), x)


def test_zeros_are_kept() -> None:
    quantized = quantize(torch.zeros(1, 32), 3, symmetric=True)
    assert not quantized.dequantize().any()


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_kernels_format_holds_the_values(bits: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 128)
    x[0] = 0.7
    quantized = quantize(x, bits, group_size=64)
    grid = quantized.grid(torch.float32)
    packed = grid.pack(quantized.codes.float())
    torch.testing.assert_close(packed.dequantize(), quantized.dequantize().float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("x", "bits", "group_size", "message"),
    [
        (torch.zeros(2, 64), 1, None, "bits must be from 2 to 8, not 1"),
        (torch.zeros(2, 64), 9, None, "bits must be from 2 to 8, not 9"),
        (torch.zeros(2, 48), 4, 32, "group_size must divide the 48 columns, but is 32"),
        (torch.full((2, 64), torch.inf), 4, None, "x must be a finite matrix"),
        (torch.zeros(64), 4, None, "x must be a finite matrix"),
    ],
)
def test_what_cannot_be_quantized_is_refused(
    x: Tensor, bits: int, group_size: GroupSize, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(x, bits, group_size=group_size)


def test_a_whole_tensor_shares_one_range() -> None:
    quantized = quantize(torch.arange(128.0).view(2, 64), 7, group_size="tensor")
    assert isinstance(quantized, Uniform)
    assert quantized.scales.tolist() == [[1.0]]
    assert quantized.codes.flatten().tolist() == list(range(128))
