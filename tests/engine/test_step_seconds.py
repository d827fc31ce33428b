"""The seconds of a step by its rows are a line through what was measured."""

from __future__ import annotations

import random

import pytest

from fastserve.engine.step_seconds import StepSeconds


def measured(*steps: tuple[int, float]) -> StepSeconds:
    seconds = StepSeconds()
    for step in steps:
        seconds.observe(*step)
    return seconds


def test_before_steps_of_different_rows_a_row_costs_nothing() -> None:
    assert measured().of(3) == 0
    seconds = measured((2, 9.0), (2, 0.004), (2, 0.004))
    assert seconds.of(2) == seconds.of(7) == 0.004
    assert seconds.per_row == 0


def test_the_first_step_of_a_number_of_rows_does_not_count() -> None:
    seconds = measured((1, 9.0), (1, 0.003), (4, 9.0), (4, 0.006), (1, 0.003), (4, 0.006))
    assert seconds.per_row == pytest.approx(0.001)
    assert seconds.of(9) == pytest.approx(0.011)


@pytest.mark.parametrize(("base", "per_row"), [(0.003, 0.0005), (0.02, 0.0)])
def test_a_noisy_line_is_found_and_followed(base: float, per_row: float) -> None:
    numbers = random.Random(0)
    seconds = StepSeconds()
    for slower in (1, 3):
        for _ in range(300):
            rows = numbers.choice([1, 1, 1, 5, 9])
            seconds.observe(rows, slower * (base + per_row * rows) * numbers.uniform(0.95, 1.05))
        for rows in (1, 4, 9):
            assert seconds.of(rows) == pytest.approx(slower * (base + per_row * rows), rel=0.1)


def test_what_a_row_costs_is_not_forgotten_while_all_steps_are_alike() -> None:
    seconds = measured(*[(rows, 0.003 + 0.001 * rows) for rows in (1, 5) * 10], *[(1, 0.004)] * 2000)
    assert seconds.per_row == pytest.approx(0.001, rel=0.01)


def test_a_row_never_costs_less_than_nothing() -> None:
    seconds = measured(*[(rows, 0.01 - 0.001 * rows) for rows in (1, 5) * 10])
    assert seconds.per_row == 0
    assert seconds.of(100) > 0
