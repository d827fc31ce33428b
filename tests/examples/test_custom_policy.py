"""A policy in one file decides who runs, with no change to any other file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve import Model, ModelServer, cli
from fastserve.config import Config
from fastserve.errors import RequestError
from fastserve.scheduling.policies.registry import make_policy
from fastserve.types import RequestView

EXAMPLES = Path(__file__).parents[2] / "examples"
OWN = Config(policy=f"{EXAMPLES}/custom_policy.py:earliest_deadline_first", alpha=8.0)
POLICY = make_policy(OWN)
priorities = st.integers(-(2**31), 2**31 - 1)


def rank(priority: int, arrival: float) -> float:
    """The deadline."""
    view = RequestView("", 0, priority, arrival, "", 100, 100, waiting_since=arrival, num_tokens=100)
    (deadline,) = POLICY.rank(view, now=0.0)
    return deadline


@given(priorities, priorities, st.floats(0.0, 1e6), st.floats(0.0, 1e6))
def test_nobody_is_overtaken_by_who_came_after_its_deadline(
    priority: int, other: int, arrival: float, later: float
) -> None:
    if rank(other, arrival + later) < rank(priority, arrival):
        assert arrival + later <= rank(priority, arrival)


def test_it_prints_the_order_of_each_policy() -> None:
    program = [sys.executable, str(EXAMPLES / "custom_policy.py")]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    orders = dict(line.split(": ") for line in done.stdout.splitlines())
    assert list(orders) == ["fcfs", "priority_age", "earliest_deadline_first"]
    assert orders["earliest_deadline_first"] == "chat, form, second form, batch job, late chat"
    assert len(set(orders.values())) == 3


def test_serve_refuses_what_it_cannot_load_before_it_starts_anything(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["serve", "--policy", f"{tmp_path}/none.py:make"]) == 1
    assert f"policy: got '{tmp_path}/none.py:make', which cannot be loaded" in capsys.readouterr().err


def test_the_engine_preempts_by_it(model: Model) -> None:
    with ModelServer(model) as server:
        patient = server.submit("One, two,", priority=-3, max_tokens=400, temperature=0, ignore_eos=True)
        next(iter(patient))  # it has the only place
        urgent = server.submit("The capital of France is", priority=3, max_tokens=8, temperature=0)
        assert "Paris" in urgent.result(timeout=60)
        patient.cancel()
        with pytest.raises(RequestError, match="cancel"):  # had it kept its place, it would have ended
            patient.result(timeout=60)


@pytest.mark.parametrize("priority", [-(2**31), 2**31 - 1])
def test_every_priority_has_a_finite_rank(priority: int) -> None:
    assert abs(rank(priority, 0.0)) < 1e5
