"""Grids with whole zero points, the search for them, and the kernels' formats of their codes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.compression.quantization.grid import Grid, search
from fastserve_kernels.formats import Int4, Int8
from fastserve_kernels.formats.compressed_tensors import bits_of

BITS = st.integers(2, 8)


@settings(deadline=None)
@given(bits=BITS, symmetric=st.booleans(), seed=st.integers(0, 999), shift=st.sampled_from([0.0, 3.0, -9.0]))
def test_every_weight_is_within_half_a_step(bits: int, symmetric: bool, seed: int, shift: float) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(3, 64) + shift
    grid = Grid.min_max(weight, bits, 32, torch.float32, symmetric)
    codes = grid.quantize(weight)
    assert codes.min() >= 0
    assert codes.max() < 2**bits
    error = (grid.dequantize(codes) - weight).abs()
    rounding = 2**-21 * weight.abs().max()  # of float32, in numbers of that size
    assert (error <= grid.scales.repeat_interleave(32, 1) / 2 + rounding).all()


@settings(deadline=None, max_examples=25)
@given(bits=BITS, symmetric=st.booleans(), seed=st.integers(0, 999))
def test_the_kernels_format_has_the_same_values(bits: int, symmetric: bool, seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(4, 64)
    grid = search(weight, bits, 32, symmetric, torch.bfloat16)
    codes = grid.quantize(weight)
    packed = grid.pack(codes)
    assert isinstance(packed, Int4 if bits <= 4 else Int8)
    assert torch.equal(packed.dequantize(), grid.dequantize(codes))
    assert bits_of(packed) <= bits


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_bits_are_seen_from_the_codes(bits: int) -> None:
    weight = torch.linspace(-1, 1, 256)[None]
    grid = Grid.min_max(weight, bits, 256, torch.float32, False)
    assert bits_of(grid.pack(grid.quantize(weight))) == bits


def test_a_narrower_range_is_taken_where_it_costs_less() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 128) ** 3
    whole = Grid.min_max(weight, 3, 64, torch.float32, False)
    narrow = search(weight, 3, 64, False, torch.float32)

    def error(grid: Grid) -> float:
        return float((grid.dequantize(grid.quantize(weight)) - weight).square().sum())

    assert error(narrow) < 0.95 * error(whole)


def test_a_costly_column_is_kept_better() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 64)
    costs = torch.ones(64)
    costs[7] = 1000.0

    def error(metric: torch.Tensor) -> float:
        grid = search(weight, 3, 64, False, torch.float32, metric)
        return float((grid.dequantize(grid.quantize(weight)) - weight)[:, 7].square().sum())

    assert error(costs) < 0.2 * error(torch.ones(64))


def test_a_metric_of_blocks_is_the_cost_of_the_output() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(16, 64), torch.randn(500, 64) @ torch.randn(64, 64)
    hessian = x.T @ x / 500

    def error(metric: torch.Tensor | None) -> float:
        grid = search(weight, 4, 64, False, torch.float32, metric)
        return float(((grid.dequantize(grid.quantize(weight)) - weight) @ x.T).square().sum())

    assert error(hessian[None]) < error(hessian.diagonal()) < error(None)


def test_groups_of_zeros_stay_zeros() -> None:
    grid = search(torch.zeros(2, 64), 4, 32, False, torch.bfloat16)
    assert not grid.dequantize(grid.quantize(torch.zeros(2, 64))).any()
