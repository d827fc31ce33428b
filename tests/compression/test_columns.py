"""Leaving out columns, against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastserve.compression.calibration.regression import Regression
from fastserve.compression.pruning.columns import removal_order, unit_columns


def inputs(tokens: int = 400, width: int = 8) -> Tensor:
    """Correlated ones, float64."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(width, width, dtype=torch.float64, generator=generator)
    return torch.randn(tokens, width, dtype=torch.float64, generator=generator) @ mix


def regression(x: Tensor, y: Tensor) -> Regression:
    return Regression(y.T @ x / len(x), x.T @ x / len(x), torch.zeros(y.shape[1], x.shape[1]).double(), 0.0)


def error(x: Tensor, y: Tensor, found: Regression, columns: Tensor) -> float:
    """E||y - W x||^2 of the best weight of these columns."""
    return float((y - x[:, columns] @ found.solve(columns).double().T).square().sum(1).mean())


def test_the_solution_is_that_of_least_squares() -> None:
    x, y = inputs(), torch.randn(400, 5, dtype=torch.float64)
    columns = torch.tensor([0, 2, 5])
    expected = torch.linalg.lstsq(x[:, columns], y).solution.T
    torch.testing.assert_close(regression(x, y).solve(columns).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("unit", [1, 2])
def test_errors_are_those_of_the_columns_that_are_left(unit: int) -> None:
    x = inputs()
    y = x @ torch.randn(8, 5, dtype=torch.float64) + torch.randn(400, 5, dtype=torch.float64)
    found = regression(x, y)
    gone = removal_order(found, unit, 8 // unit - 1)
    least = error(x, y, found, torch.arange(8))
    for count, expected in enumerate(gone.errors.tolist()):
        kept = torch.tensor([u for u in range(8 // unit) if u not in gone.order[:count].tolist()])
        assert error(x, y, found, unit_columns(kept, unit)) - least == pytest.approx(
            expected, rel=2e-2, abs=1e-3
        )


def test_the_first_to_go_costs_least_of_all() -> None:
    x = inputs()
    y = x @ torch.randn(8, 5, dtype=torch.float64)
    found = regression(x, y)
    costs = [error(x, y, found, torch.tensor([u for u in range(8) if u != gone])) for gone in range(8)]
    assert removal_order(found, 1, 1).order.tolist() == [min(range(8), key=costs.__getitem__)]


def test_a_column_that_others_can_replace_goes_before_a_small_one_that_they_cannot() -> None:
    x = torch.randn(500, 4, dtype=torch.float64)
    x[:, 3] = x[:, 0] + x[:, 1]
    y = x @ torch.tensor([[3.0, 3.0, 0.5, 3.0]], dtype=torch.float64).T
    weight = torch.tensor([[3.0, 3.0, 0.5, 3.0]])
    found = Regression.towards(weight, y.T @ x / 500, x.T @ x / 500, tokens=10**7)
    assert removal_order(found, 1, 1).order.item() in (0, 1, 3)


def test_a_direction_without_inputs_keeps_its_weight() -> None:
    x = inputs()
    x[:, 4] = 0
    weight = torch.randn(5, 8)
    cross = 2 * weight.double() @ x.T @ x / len(x)
    found = Regression.towards(weight, cross, x.T @ x / len(x), tokens=10**10).solve(torch.arange(8))
    torch.testing.assert_close(found[:, 4], weight[:, 4])
    torch.testing.assert_close(found[:, :4], 2 * weight[:, :4], atol=1e-3, rtol=1e-3)


def test_directions_of_equal_inputs_can_be_left_out() -> None:
    x = inputs()
    x[:, 7] = x[:, 6]
    weight = torch.randn(5, 8)
    hessian = x.T @ x / len(x)
    found = Regression.towards(weight, weight.double() @ hessian, hessian, tokens=10**4)
    gone = removal_order(found, 1, 1)
    assert gone.order.item() in (6, 7)
    assert gone.errors[1] < 1e-2 * (weight.double() @ hessian * weight).sum()


def test_few_tokens_change_a_weight_less_than_many() -> None:
    x = inputs()
    hessian, weight = x.T @ x / len(x), torch.randn(5, 8)
    changes = [
        float(
            (
                Regression.towards(weight, 2 * weight.double() @ hessian, hessian, tokens).solve(
                    torch.arange(8)
                )
                - weight
            ).norm()
        )
        for tokens in (1, 8, 1000)
    ]
    assert changes == sorted(changes)
    assert changes[0] < 0.5 * float(weight.norm()) < changes[2] <= float(weight.norm())
