"""Workloads from distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastserve.workload.lengths import LogNormalLengths
from fastserve.workload.synthetic import synthetic_arrivals

PROMPTS, OUTPUTS = LogNormalLengths(225, 1.2, 1, 1024), LogNormalLengths(200, 1.1, 1, 1024)


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 4.0])
def test_arrivals_have_the_rate_and_the_coefficient_of_variation(cv: float) -> None:
    arrivals = synthetic_arrivals(100_000, 5.0, PROMPTS, OUTPUTS, seed=1, cv=cv)
    gaps = np.diff([0.0, *(arrival.time for arrival in arrivals)])
    assert len(arrivals) == 100_000
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / 5, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05, abs=1e-6)


def test_a_poisson_process_has_exponential_gaps() -> None:
    arrivals = synthetic_arrivals(100_000, 2.0, PROMPTS, OUTPUTS, seed=1)
    gaps = np.diff([arrival.time for arrival in arrivals])
    for share in (0.1, 0.5, 0.9, 0.99):
        assert np.quantile(gaps, share) == pytest.approx(-math.log(1 - share) / 2, rel=0.05)


def test_the_seed_decides_everything() -> None:
    def draw(seed: int) -> list[object]:
        return list(synthetic_arrivals(100, 5.0, PROMPTS, OUTPUTS, seed, cv=2.0))

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_lengths_do_not_depend_on_the_rate() -> None:
    slow, fast = (synthetic_arrivals(100, rate, PROMPTS, OUTPUTS, seed=0) for rate in (1.0, 10.0))
    assert [a.num_prompt_tokens for a in slow] == [a.num_prompt_tokens for a in fast]
    assert [a.time for a in slow] == pytest.approx([10 * a.time for a in fast])


@pytest.mark.parametrize(("rate", "cv", "name"), [(0, 1, "rate"), (math.inf, 1, "rate"), (1, -1, "cv")])
def test_a_process_that_cannot_be_is_refused_by_name(rate: float, cv: float, name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        synthetic_arrivals(1, rate, PROMPTS, OUTPUTS, seed=0, cv=cv)
