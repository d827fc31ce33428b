"""Steps that follow one another."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.scheduling.sequence import StepPlan
from fastserve.simulation.step_run import StepRun


def run_of(start: float, first_seconds: float, growth: float, num_steps: int) -> StepRun:
    return StepRun(StepPlan([], []), start, first_seconds, growth, num_steps, True, True)


@given(
    start=st.floats(0, 1e6),
    first_seconds=st.floats(1e-4, 10),
    growth=st.floats(0, 0.1),
    num_steps=st.integers(1, 2000),
    number=st.integers(0, 2000),
)
def test_steps_end_one_after_the_other(
    start: float, first_seconds: float, growth: float, num_steps: int, number: int
) -> None:
    run = run_of(start, first_seconds, growth, num_steps)
    number = min(number, num_steps)
    assert run.num_ended(run.end(number)) == number
    if number:
        assert run.num_ended(run.end(number) - first_seconds / 2) == number - 1


def test_each_step_is_longer_by_the_growth() -> None:
    run = run_of(10.0, 1.0, 0.5, 4)
    assert [run.end(number) for number in range(5)] == pytest.approx([10.0, 11.0, 12.5, 14.5, 17.0])
    assert [run.num_ended(now) for now in (9.0, 10.9, 11.0, 17.0, 99.0)] == [0, 0, 1, 4, 4]
