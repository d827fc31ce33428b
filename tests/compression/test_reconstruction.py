"""The least squares of what remains."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastserve.compression.calibration.hessian import damped
from fastserve.compression.pruning.reconstruction import reconstruct
from fastserve.compression.sparsity_patterns import UNSTRUCTURED, Pattern, TwoOfFour


def problem(seed: int, rows: int = 12, columns: int = 32, tokens: int = 40) -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of inputs of which some are much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    sizes = torch.randn(columns, generator=generator).exp()
    x = torch.randn(tokens, columns, generator=generator) @ mixing * sizes
    return torch.randn(rows, columns, generator=generator), x.T @ x / tokens


def output_error(weight: Tensor, target: Tensor, hessian: Tensor) -> Tensor:
    """Of each row."""
    return (((weight - target) @ hessian) * (weight - target)).sum(1)


@given(st.integers(0, 2**31), st.sampled_from((UNSTRUCTURED, TwoOfFour())))
@settings(max_examples=30)
def test_no_row_is_worse_than_its_masked_weight(seed: int, pattern: Pattern) -> None:
    weight, hessian = problem(seed)
    hessian, mask = damped(hessian), pattern.mask(weight.abs(), 0.5)
    solved = reconstruct(weight, hessian, mask)
    assert not solved[~mask].any()
    before, after = output_error(weight * mask, weight, hessian), output_error(solved, weight, hessian)
    assert (after <= before * (1 + 1e-5)).all()


def test_it_comes_near_the_solution_of_the_normal_equations() -> None:
    weight, hessian = problem(0)
    hessian, mask = damped(hessian), UNSTRUCTURED.mask(weight.abs(), 0.5)
    exact = torch.zeros_like(weight)
    for row, kept, found in zip(weight, mask, exact, strict=True):
        found[kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ row)
    solved = reconstruct(weight, hessian, mask)
    assert output_error(solved, weight, hessian).sum() <= 1.01 * output_error(exact, weight, hessian).sum()


def test_what_is_kept_whole_stays_as_it_is() -> None:
    weight, hessian = problem(1)
    assert torch.allclose(reconstruct(weight, hessian, torch.ones_like(weight, dtype=torch.bool)), weight)


def test_inputs_that_are_always_0_do_no_harm() -> None:
    weight, hessian = problem(2)
    hessian[:, :4] = hessian[:4] = 0
    mask = UNSTRUCTURED.mask(weight.abs(), 0.5)
    assert reconstruct(weight, damped(hessian), mask).isfinite().all()
    assert torch.allclose(reconstruct(weight, damped(torch.zeros_like(hessian)), mask), weight * mask)
