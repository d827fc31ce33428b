"""Figures of runs."""

from __future__ import annotations

import pytest

from fastserve.simulation.figures import ClassFigures, Objective, RunFigures, goodput, run_figures
from fastserve.simulation.result import Records, SimulationResult, Totals
from fastserve.workload.arrival import Arrival


def result() -> SimulationResult:
    arrivals = [Arrival(1.0, 10, 5, priority=2), Arrival(2.0, 10, 10), Arrival(3.0, 20, 1)]
    records = Records(3)
    records.first_token = [1.5, 4.0, 4.0]
    records.completion = [2.0, 7.0, 4.0]
    records.num_preemptions = [0, 3, 1]
    return SimulationResult(arrivals, records, Totals(66, 6, 10, 4, 5.0, 50.0))


def test_the_figures_of_each_class_and_of_all() -> None:
    run = run_figures(result(), "fcfs", 0.5, 2.0, 2, Objective(1.0, 0.2))
    assert [row.priority for row in run.classes] == [2, 0, None]
    assert (run.seconds, run.utilization) == (6.0, pytest.approx(5 / 12))
    assert run.computed_over_needed == pytest.approx(1.1)
    assert run.cached_share == pytest.approx(0.25)
    top, rest, everyone = run.classes
    assert (top.requests, top.ttft_mean, top.completion_mean, top.preemptions) == (1, 0.5, 1.0, 0)
    assert (rest.requests, rest.ttft_mean, rest.completion_mean, rest.preemptions) == (2, 1.5, 3.0, 4)
    assert rest.normalized_latency_mean == pytest.approx((5 / 10 + 1 / 1) / 2)
    assert everyone.tokens_per_second == pytest.approx(16 / 6)
    assert everyone.within_objective == pytest.approx(2 / 3), "the second one's first token comes too late"


def run_at(load: float, share: float) -> RunFigures:
    row = ClassFigures(None, 1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, share)
    return RunFigures("fcfs", load, 1.0, 1.0, 1.0, 0.0, 0.0, [row])


def test_goodput_is_between_the_loads() -> None:
    assert goodput([run_at(1.0, 0.95), run_at(1.1, 0.85)]) == pytest.approx(1.05)
    assert goodput([run_at(1.1, 0.5), run_at(0.9, 1.0), run_at(1.0, 0.9)]) == pytest.approx(1.0)
    assert goodput([run_at(1.0, 0.95)]) is None, "it may be higher"
    assert goodput([run_at(1.0, 0.5), run_at(1.1, 0.4)]) is None, "it is lower"
