"""GPTQ: the output error that it leaves, masks that it keeps, and inputs that have drifted."""

from __future__ import annotations

import pytest
import torch
from tests.compression.conftest import RunStep
from torch import Tensor

from fastserve.compression.calibration.hessian import damped, drift_corrected, inverse_factor
from fastserve.compression.quantization.gptq import Gptq, gptq_quantize, pack, round_columns
from fastserve.compression.quantization.grid import Grid, search
from fastserve.compression.quantization.refinement import coordinate_descent, fit_scales
from fastserve.compression.sparsity_patterns import mask_of
from fastserve.compression.state.source_state import SourceState
from fastserve_kernels.formats import Bitmap, Dense, Int4, Int8, Sparse24, Sparse24Int4
from fastserve_kernels.formats.compressed_tensors import bits_of

ROWS, COLUMNS = 24, 192


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def hessian() -> Tensor:
    """Of inputs of few directions and one large channel."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2000, 40, generator=generator) @ torch.randn(40, COLUMNS, generator=generator)
    x += torch.randn(x.shape, generator=generator)
    x[:, 3] *= 10
    return damped(x.T @ x / len(x))


def cost(difference: Tensor, hessian: Tensor) -> float:
    return float(((difference @ hessian) * difference).sum())


def nearest(weight: Tensor) -> tuple[Grid, Tensor]:
    grid = search(weight, 4, 64, False, torch.float32)
    return grid, grid.quantize(weight)


def test_the_output_error_is_much_less_than_that_of_rounding_to_nearest(
    weight: Tensor, hessian: Tensor
) -> None:
    grid, codes = gptq_quantize(weight, hessian, 4, 64, False, torch.float32)
    plain, rounded = nearest(weight)
    assert cost(grid.dequantize(codes) - weight, hessian) < 0.4 * cost(
        plain.dequantize(rounded) - weight, hessian
    )


def test_columns_are_rounded_as_the_paper_has_it(weight: Tensor, hessian: Tensor) -> None:
    """Against its first form: after each column the inverse is that of the columns left."""
    grid, _ = nearest(weight)
    order = torch.arange(COLUMNS)
    codes = round_columns(weight, inverse_factor(hessian), order, grid)
    scales, zeros = grid.per_weight()
    left, inverse = weight.double().clone(), torch.linalg.inv(hessian.double())
    expected = torch.empty_like(codes)
    for column in range(COLUMNS):
        code = (left[:, 0] / scales[:, column] + zeros[:, column]).round().clamp(0, 15)
        error = left[:, 0] - (code - zeros[:, column]) * scales[:, column]
        left = (left - error[:, None] * inverse[0] / inverse[0, 0])[:, 1:]
        inverse = (inverse - inverse[:, :1] * inverse[:1] / inverse[0, 0])[1:, 1:]
        expected[:, column] = code.float()
    assert (codes == expected).float().mean() > 0.99


def test_descent_and_new_scales_only_lower_the_error(weight: Tensor, hessian: Tensor) -> None:
    grid, codes = nearest(weight)
    before = cost(grid.dequantize(codes) - weight, hessian)
    better = coordinate_descent(weight, hessian, grid, codes)
    after = cost(grid.dequantize(better) - weight, hessian)
    assert after < 0.7 * before
    scaled = fit_scales(weight, hessian, grid, better)
    assert cost(scaled.dequantize(better) - weight, hessian) < after


def test_no_single_code_can_be_better_after_descent(weight: Tensor, hessian: Tensor) -> None:
    grid, codes = nearest(weight)
    for _ in range(20):
        codes = coordinate_descent(weight, hessian, grid, codes)
    least = cost(grid.dequantize(codes) - weight, hessian)
    for column in range(0, COLUMNS, 17):
        for step in (-1, 1):
            changed = codes.clone()
            changed[5, column] = (changed[5, column] + step).clamp(0, 15)
            assert cost(grid.dequantize(changed) - weight, hessian) >= least * (1 - 1e-5)


def test_inputs_that_have_drifted_are_made_up_for() -> None:
    generator = torch.Generator().manual_seed(2)
    before = torch.randn(500, 32, generator=generator)
    now = before @ (torch.eye(32) + 0.1 * torch.randn(32, 32, generator=generator))
    weight = torch.randn(8, 32, generator=generator)
    hessian, drift = now.T @ now / 500, (before - now).T @ now / 500
    torch.testing.assert_close(
        now @ drift_corrected(weight, hessian, drift, 1.0).T, before @ weight.T, rtol=0, atol=1e-3
    )
    assert torch.equal(drift_corrected(weight, hessian, drift, 0.0), weight)


@pytest.mark.parametrize("symmetric", [False, True])
def test_what_is_pruned_stays_zero(weight: Tensor, hessian: Tensor, symmetric: bool) -> None:
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    grid, codes = gptq_quantize(weight * mask, hessian, 4, 64, symmetric, torch.bfloat16, mask)
    assert not grid.dequantize(codes)[~mask].any()
    assert grid.dequantize(codes)[mask].any()


def test_two_of_four_stay_packed(weight: Tensor, hessian: Tensor) -> None:
    sparse = Sparse24.pack(weight)
    grid, codes = gptq_quantize(sparse.dequantize(), hessian, 4, 64, True, torch.bfloat16, mask_of(sparse))
    packed = pack(grid, codes, sparse)
    assert isinstance(packed, Sparse24Int4)
    assert torch.equal(packed.dequantize(), grid.dequantize(codes))


def test_other_patterns_become_plain_codes(weight: Tensor, hessian: Tensor) -> None:
    sparse = Bitmap.pack(weight, density=0.5)
    grid, codes = gptq_quantize(sparse.dequantize(), hessian, 4, 64, True, torch.bfloat16, mask_of(sparse))
    assert isinstance(pack(grid, codes, sparse), Int4)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_a_model_has_codes_of_so_many_bits(source: SourceState, run_step: RunStep, bits: int) -> None:
    after = run_step(Gptq(bits=bits, group_size=32), source)
    for weight in after.linears(1).values():
        assert isinstance(weight, Int4 | Int8)
        assert bits_of(weight) <= bits
        assert weight.group_size == 32


def test_linears_that_are_no_targets_stay(source: SourceState, run_step: RunStep) -> None:
    after = run_step(Gptq(group_size=None, targets=("*.down_proj",)), source)
    kinds = {name: type(weight) for name, weight in after.linears(0).items()}
    assert kinds.pop("mlp.down_proj") is Int4
    assert set(kinds.values()) == {Dense}


def test_the_same_run_gives_the_same_bytes(source: SourceState, run_step: RunStep) -> None:
    step = Gptq(group_size=32)
    first, second = run_step(step, source, "first"), run_step(step, source, "second")
    for name in ("layer-0000.safetensors", "layer-0002.safetensors"):
        assert (first.directory / name).read_bytes() == (second.directory / name).read_bytes()
