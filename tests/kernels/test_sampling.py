"""Sampling against the sorting oracle, and log-probabilities against log_softmax."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastserve_kernels import ops, reference

LIMITS = {
    "none": (0, 1.0, 0.0),
    "top_k 1": (1, 1.0, 0.0),
    "top_k": (50, 1.0, 0.0),
    "top_k beyond the candidates": (500, 1.0, 0.0),
    "top_k beyond the candidates with top_p": (500, 0.6, 0.0),
    "top_p": (0, 0.9, 0.0),
    "small top_p": (-1, 1e-6, 0.0),
    "top_p near 1": (0, 0.999, 0.0),
    "min_p": (0, 1.0, 0.1),
    "small min_p": (0, 1.0, 1e-4),
    "all": (40, 0.8, 0.05),
}


def parameters(
    rows: int, temperature: float, limits: tuple[int, float, float]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    top_k, top_p, min_p = limits
    return (
        torch.full((rows,), temperature),
        torch.full((rows,), top_k),
        torch.full((rows,), top_p),
        torch.full((rows,), min_p),
        torch.rand(rows, dtype=torch.float64),
    )


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("vocabulary", [1, 5, 130, 5003])
@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_equals_the_oracle(limits: str, vocabulary: int, spread: float) -> None:
    logits = torch.randn(64, vocabulary) * spread
    given_ = parameters(64, 0.8, LIMITS[limits])
    assert torch.equal(ops.sample(logits, *given_), reference.sample(logits, *given_))


@pytest.mark.parametrize("limits", LIMITS)
def test_equals_the_oracle_where_many_tokens_tie(limits: str) -> None:
    """Logits of bfloat16 models have few distinct values."""
    logits = (torch.randn(64, 5003) * 3).round()
    given_ = parameters(64, 1.0, LIMITS[limits])
    assert torch.equal(ops.sample(logits, *given_), reference.sample(logits, *given_))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("limits", LIMITS)
def test_logits_of_half_precision_that_lie_apart(limits: str, dtype: torch.dtype) -> None:
    logits = (torch.randn(777, 6) * 3).to(dtype).t()
    given_ = parameters(6, 0.8, LIMITS[limits])
    assert torch.equal(ops.sample(logits, *given_), reference.sample(logits, *given_))


@given(seed=st.integers(0, 2**32), rows=st.integers(0, 12))
@settings(max_examples=30, deadline=None)
def test_rows_do_not_depend_on_each_other(seed: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 1000, generator=generator) * 3
    kinds = list(LIMITS.values())
    picked = torch.randint(len(kinds), (rows,), generator=generator).tolist()
    temperature = torch.randint(0, 3, (rows,), generator=generator) / 2
    top_k = torch.tensor([kinds[i][0] for i in picked], dtype=torch.int64)
    top_p = torch.tensor([kinds[i][1] for i in picked], dtype=torch.float32)
    min_p = torch.tensor([kinds[i][2] for i in picked], dtype=torch.float32)
    uniform = torch.rand(rows, dtype=torch.float64, generator=generator)
    given_ = (logits, temperature, top_k, top_p, min_p, uniform)
    together = ops.sample(*given_)
    assert torch.equal(together, reference.sample(*given_))
    for row in range(rows):
        assert ops.sample(*(tensor[row : row + 1] for tensor in given_)).item() == together[row]


@pytest.mark.parametrize("limits", ["none", "top_k", "all"])
def test_draws_follow_the_distribution(limits: str) -> None:
    """Evenly spaced uniform numbers give each token as often as its probability says, to one draw."""
    draws = 20_000
    logits = torch.randn(1, 300) * 2
    top_k, top_p, min_p = LIMITS[limits]
    probabilities = logits[0].double().softmax(-1)
    if limits != "none":
        kept = probabilities >= probabilities.topk(top_k).values[-1]
        probabilities = torch.where(kept, probabilities, 0.0) / probabilities[kept].sum()
        ordered, order = probabilities.sort(descending=True)
        probabilities[order[ordered.cumsum(0) - ordered >= top_p]] = 0.0
        probabilities[probabilities < min_p * ordered[0]] = 0.0
        probabilities /= probabilities.sum()
    temperature, k, p, m, _ = parameters(draws, 1.0, LIMITS[limits])
    uniform = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    tokens = ops.sample(logits.expand(draws, -1), temperature, k, p, m, uniform)
    assert (tokens.bincount(minlength=300) - probabilities * draws).abs().max() <= 1.0


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2**-53])
def test_forbidden_tokens_are_never_drawn(limits: str, uniform: float) -> None:
    logits = torch.full((3, 2000), float("-inf"))
    logits[0, 1999] = logits[1, 0] = 1.0
    logits[2, 700:703] = 5.0
    temperature, top_k, top_p, min_p, _ = parameters(3, 1.0, LIMITS[limits])
    tokens = ops.sample(
        logits, temperature, top_k, top_p, min_p, torch.full((3,), uniform, dtype=torch.float64)
    )
    assert tokens[:2].tolist() == [1999, 0]
    assert 700 <= tokens[2] < 703


NOT_FINITE = {
    "NaN": [math.nan],
    "NaN among numbers": [math.nan, 1.0, 2.0, -3.0, 0.0, 5.0, 1.0],
    "numbers before NaN": [1.0, 2.0, 7.0, math.nan],
    "infinity": [1.0, math.inf, 0.0, 2.0, 3.0],
    "all masked": [-math.inf],
    "NaN, infinities and a number": [math.nan, math.inf, -math.inf, 1.0],
}
"""What rows are filled with, again and again."""


@pytest.mark.parametrize("implementation", [ops, reference], ids=["ops", "reference"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("vocabulary", [1, 5, 130, 5003])
@pytest.mark.parametrize("limits", LIMITS)
def test_a_row_without_a_distribution_gives_one_of_its_tokens(
    limits: str, vocabulary: int, temperature: float, implementation: ModuleType
) -> None:
    """And takes nothing from the row beside it."""
    rows = [(values * vocabulary)[:vocabulary] for values in NOT_FINITE.values()]
    finite = torch.randn(1, vocabulary)
    logits = torch.cat([torch.tensor(rows), finite])
    *given_, uniform = parameters(len(logits), temperature, LIMITS[limits])
    for share in (0.0, 0.5, 1.0 - 2**-53):
        each = (*given_, torch.full_like(uniform, share))
        tokens = implementation.sample(logits, *each)
        assert ((tokens >= 0) & (tokens < vocabulary)).all()
        assert tokens[-1] == implementation.sample(finite, *(tensor[-1:] for tensor in each)).item()


def test_temperature_zero_is_greedy_and_tiny_ones_nearly() -> None:
    logits = torch.randn(8, 1000)
    for temperature in (0.0, 1e-40, 1e-6):
        given_ = parameters(8, temperature, LIMITS["none"])
        assert torch.equal(ops.sample(logits, *given_), logits.argmax(-1))


@pytest.mark.parametrize("k", [0, 1, 20])
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_log_probs(rows: int, k: int) -> None:
    logits = torch.randn(rows, 3001) * 4
    token_ids = torch.randint(3001, (rows,))
    came = ops.log_probs(logits, token_ids, k)
    wanted = reference.log_probs(logits, token_ids, k)
    for one, other in zip(came, wanted, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_log_probs_of_ties_come_by_id() -> None:
    logits = torch.zeros(1, 500)
    logits[0, 400:] = 1.0
    _, rank, top_ids, _ = ops.log_probs(logits, torch.tensor([3]), 5)
    assert rank.item() == 101
    assert top_ids.tolist() == [[400, 401, 402, 403, 404]]
