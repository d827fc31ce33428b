"""Workloads made of others."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.workload.arrival import Arrival
from fastserve.workload.transformations import (
    at_rate,
    at_speed,
    cut_lengths,
    draw_priorities,
    draw_tenants,
    mean_rate,
    scale_lengths,
)


@st.composite
def arrivals(draw: st.DrawFn) -> list[Arrival]:
    """Workloads with blocks of 512 tokens and without."""
    times = sorted(draw(st.lists(st.floats(0, 1000), min_size=1, max_size=8)))
    workload = []
    for time in times:
        prompt, output = draw(st.integers(1, 5000)), draw(st.integers(1, 1000))
        hashes = tuple(range(-(-prompt // 512))) if draw(st.booleans()) else ()
        workload.append(Arrival(time, prompt, output, block_hashes=hashes, block_size=512 if hashes else 0))
    return workload


def num_blocks(arrival: Arrival) -> int:
    return -(-arrival.num_prompt_tokens // arrival.block_size) if arrival.block_size else 0


@given(arrivals(), st.floats(0.01, 100))
def test_time_is_stretched_to_a_rate_and_bursts_stay(workload: list[Arrival], rate: float) -> None:
    if workload[-1].time - workload[0].time < 1e-3:
        return
    stretched = at_rate(workload, rate)
    assert mean_rate(stretched) == pytest.approx(rate)
    factor = mean_rate(workload) / rate
    assert [a.time for a in stretched] == pytest.approx([a.time * factor for a in workload])


def test_time_passes_faster() -> None:
    assert at_speed([Arrival(3.0, 1, 1, priority=2)], 1.5) == [Arrival(2.0, 1, 1, priority=2)]


@given(arrivals(), st.floats(0.001, 4))
def test_scaled_prompts_keep_their_blocks(workload: list[Arrival], factor: float) -> None:
    for before, after in zip(workload, scale_lengths(workload, factor), strict=True):
        assert after.block_hashes == before.block_hashes
        assert num_blocks(after) == len(after.block_hashes)
        assert after.num_output_tokens == max(1, round(before.num_output_tokens * factor))
        real = after.block_size / before.block_size if after.block_size else factor
        error = abs(after.num_prompt_tokens - before.num_prompt_tokens * real)
        assert error <= max(1, abs(512 * (real - factor)))


def test_a_factor_that_divides_the_block_is_exact() -> None:
    [short] = scale_lengths([Arrival(0.0, 1024 + 80, 8, block_hashes=(1, 2, 3), block_size=512)], 1 / 8)
    assert short == Arrival(0.0, 138, 1, block_hashes=(1, 2, 3), block_size=64)


@given(arrivals(), st.integers(1, 3000), st.none() | st.integers(1, 500))
def test_cut_prompts_lose_the_blocks_behind_the_cut(
    workload: list[Arrival], max_prompt_tokens: int, max_output_tokens: int | None
) -> None:
    for before, after in zip(
        workload, cut_lengths(workload, max_prompt_tokens, max_output_tokens), strict=True
    ):
        assert after.num_prompt_tokens == min(before.num_prompt_tokens, max_prompt_tokens)
        assert after.num_output_tokens == min(before.num_output_tokens, max_output_tokens or math.inf)
        assert after.block_hashes == before.block_hashes[: num_blocks(after)]
        assert num_blocks(after) == len(after.block_hashes)


def test_nothing_is_cut_without_a_limit() -> None:
    workload = [Arrival(0.0, 10**6, 10**6)]
    assert cut_lengths(workload) == workload


def test_priorities_and_tenants_come_in_their_shares_and_independently() -> None:
    workload = [Arrival(0.0, 1, 1)] * 20_000
    drawn = draw_tenants(draw_priorities(workload, {10: 0.1, 0: 0.9}, seed=5), {"a": 3, "b": 1}, seed=5)
    priorities, tenants = Counter(a.priority for a in drawn), Counter(a.tenant for a in drawn)
    both = Counter((a.priority, a.tenant) for a in drawn)
    assert priorities[10] / len(drawn) == pytest.approx(0.1, abs=0.01)
    assert tenants["a"] / len(drawn) == pytest.approx(0.75, abs=0.01)
    assert both[10, "b"] / len(drawn) == pytest.approx(0.025, abs=0.005)
    assert set(priorities) == {10, 0}
    assert set(tenants) == {"a", "b"}


def test_the_seed_decides_who_is_urgent() -> None:
    workload = [Arrival(0.0, 1, 1)] * 100

    def draw(seed: int) -> list[int]:
        return [a.priority for a in draw_priorities(workload, {1: 1, 0: 1}, seed)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@pytest.mark.parametrize(
    ("transform", "name"),
    [
        (lambda w: at_rate(w, 0), "rate"),
        (lambda w: at_rate(w[:1], 1), "no rate"),
        (lambda w: mean_rate([]), "no rate"),
        (lambda w: at_speed(w, -1), "speed"),
        (lambda w: at_speed(w, math.nan), "speed"),
        (lambda w: scale_lengths(w, 0), "factor"),
        (lambda w: cut_lengths(w, 0), "max_prompt_tokens"),
        (lambda w: cut_lengths(w, None, 0), "max_output_tokens"),
        (lambda w: draw_priorities(w, {1: -1, 0: 2}, 0), "shares"),
        (lambda w: draw_priorities(w, {1: math.nan}, 0), "shares"),
        (lambda w: draw_tenants(w, {"a": 0.0}, 0), "shares"),
    ],
)
def test_what_cannot_be_is_refused_by_name(transform: Callable[[list[Arrival]], object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        transform([Arrival(0.0, 1, 1), Arrival(1.0, 1, 1)])
