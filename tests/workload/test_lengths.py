"""Lengths of prompts and answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastserve.workload.lengths import LogNormalLengths


def test_the_mean_is_the_arithmetic_one_and_sigma_that_of_the_logarithm() -> None:
    drawn = LogNormalLengths(225, 1.2, 1, 10**9).draw(10**6, np.random.default_rng(0))
    assert drawn.mean() == pytest.approx(225, rel=0.02)
    long = drawn[drawn > 20]  # where rounding to whole tokens does not show
    assert np.median(drawn) == pytest.approx(225 * math.exp(-(1.2**2) / 2), rel=0.02)
    assert np.percentile(long, 99.9) > 10 * drawn.mean()


def test_lengths_are_clipped_to_the_limits_and_both_are_met() -> None:
    drawn = LogNormalLengths(160, 0.7, 100, 200).draw(1000, np.random.default_rng(0))
    assert (drawn.min(), drawn.max()) == (100, 200)
    assert drawn.dtype == np.int64


def test_equal_lengths_are_equal() -> None:
    assert set(LogNormalLengths.equal(37).draw(100, np.random.default_rng(0))) == {37}


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((0, 1, 1, 2), "mean"),
        ((math.inf, 1, 1, 2), "mean"),
        ((math.nan, 1, 1, 2), "mean"),
        ((1, -0.1, 1, 2), "sigma"),
        ((1, 1, 0, 2), "low"),
        ((1, 1, 3, 2), "high"),
    ],
)
def test_a_distribution_that_cannot_be_is_refused_by_name(
    arguments: tuple[float, float, int, int], name: str
) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        LogNormalLengths(*arguments)
