"""Sampling's Triton kernels against `reference`, interpreted where there is no GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastserve_kernels import reference
from fastserve_kernels.gpu import sampling

pytestmark = pytest.mark.usefixtures("poisoned")

LIMITS = [
    (0, 1.0, 0.0),
    (1, 1.0, 0.0),
    (50, 1.0, 0.0),
    (500, 1.0, 0.0),
    (500, 0.6, 0.0),
    (0, 0.9, 0.0),
    (-1, 1e-6, 0.0),
    (0, 0.999, 0.0),
    (0, 1.0, 0.1),
    (0, 0.7, 0.01),
    (40, 0.8, 0.05),
]
"""(top_k, top_p, min_p)"""


def parameters(limits: list[tuple[int, float, float]], temperature: float = 0.8) -> list[Tensor]:
    """temperature, top_k, top_p, min_p and uniform of as many rows."""
    top_k, top_p, min_p = zip(*limits, strict=True)
    return [
        torch.full((len(limits),), temperature),
        torch.tensor(top_k),
        torch.tensor(top_p),
        torch.tensor(min_p),
        torch.rand(len(limits), dtype=torch.float64),
    ]


def sample(logits: Tensor, given_: list[Tensor], device: torch.device) -> Tensor:
    return sampling.sample(logits.to(device), *(tensor.to(device) for tensor in given_)).cpu()


@pytest.mark.parametrize(("vocabulary", "spread"), [(5, 1.0), (4997, 4.0)])
def test_equals_the_reference(vocabulary: int, spread: float, device: torch.device) -> None:
    given_ = parameters(LIMITS)
    logits = torch.randn(len(LIMITS), vocabulary) * spread
    assert torch.equal(sample(logits, given_, device), reference.sample(logits, *given_))


def test_where_many_tokens_tie(device: torch.device) -> None:
    """Logits of bfloat16 models have few distinct values."""
    limits = [LIMITS[i] for i in (0, 2, 4, 9, 10)]
    given_ = parameters(limits)
    logits = (torch.randn(len(limits), 700) * 3).round().bfloat16()
    assert torch.equal(sample(logits, given_, device), reference.sample(logits, *given_))


def test_flat_distributions_of_which_most_is_kept(device: torch.device) -> None:
    limits = [LIMITS[i] for i in (3, 4, 7)]
    given_ = parameters(limits, temperature=5.0)
    logits = torch.randn(len(limits), 2000)
    assert torch.equal(sample(logits, given_, device), reference.sample(logits, *given_))


@given(data=st.data())
@settings(max_examples=6, deadline=None)
def test_any_parameters(device: torch.device, data: st.DataObject) -> None:
    """Each row by its own."""
    rows = data.draw(st.integers(1, 2))
    vocabulary = data.draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    logits = torch.randn(rows, vocabulary, generator=generator) * data.draw(st.floats(0.1, 10))
    if data.draw(st.booleans()):
        logits[:, 1::2] = float("-inf")

    def each(values: st.SearchStrategy[Any]) -> Tensor:
        return torch.tensor(data.draw(st.lists(values, min_size=rows, max_size=rows)))

    given_ = [
        each(st.sampled_from([0.0, 1e-7, 0.5, 1.0, 2.0])),
        each(st.integers(-1, 50)),
        each(st.floats(0.05, 1.0)).float(),
        each(st.sampled_from([0.0, 0.03, 0.3])),
        torch.rand(rows, dtype=torch.float64, generator=generator),
    ]
    assert torch.equal(sample(logits, given_, device), reference.sample(logits, *given_))


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2**-53])
def test_forbidden_tokens_are_never_drawn(uniform: float, device: torch.device) -> None:
    limits = [LIMITS[i] for i in (0, 2, 5)]
    given_ = parameters(limits)
    given_[4][:] = uniform
    for allowed in ([599], [300, 301, 302]):
        logits = torch.full((len(limits), 600), float("-inf"))
        logits[:, allowed] = 5.0
        assert set(sample(logits, given_, device).tolist()) <= set(allowed)


@pytest.mark.parametrize("values", [[math.nan], [math.nan, 1.0, 2.0], [1.0, math.inf], [-math.inf]])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, where it computes with NaN
def test_a_row_without_a_distribution_gives_one_of_its_tokens(
    values: list[float], device: torch.device
) -> None:
    """And takes nothing from the row beside it."""
    limits, vocabulary = [LIMITS[i] for i in (0, 0, 2, 9)], 300
    given_ = parameters(limits)
    given_[0][0] = 0.0
    odd = torch.tensor(values * vocabulary)[:vocabulary].expand(len(limits), vocabulary)
    finite = torch.randn(len(limits), vocabulary)
    given_[4][:] = 1.0 - 2**-53
    tokens = sample(torch.cat([odd, finite]), [torch.cat([t, t]) for t in given_], device)
    assert ((tokens >= 0) & (tokens < vocabulary)).all()
    assert torch.equal(tokens[len(limits) :], reference.sample(finite, *given_))
    chosen = torch.zeros(1, dtype=torch.int64, device=device)
    _, _, top_ids, _ = sampling.log_probs(odd[:1].to(device), chosen, 4)
    assert ((top_ids >= 0) & (top_ids < vocabulary)).all()


def test_temperature_zero_takes_the_first_of_the_likeliest(device: torch.device) -> None:
    logits = torch.randn(3, 5000)
    logits[0, [4444, 100]] = 9.0
    given_ = parameters(LIMITS[2:5], temperature=0.0)
    assert torch.equal(sample(logits, given_, device), logits.argmax(-1))


def test_strided_logits_and_no_rows(device: torch.device) -> None:
    logits = torch.randn(6, 300)
    given_ = parameters(LIMITS[4:7])
    wanted = reference.sample(logits[::2], *given_)
    assert torch.equal(sampling.sample(logits.to(device)[::2], *(t.to(device) for t in given_)).cpu(), wanted)
    assert sample(logits[:0], [tensor[:0] for tensor in given_], device).shape == (0,)


@pytest.mark.parametrize("k", [0, 7, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs(
    k: int, dtype: torch.dtype, rel_rms: Callable[[Tensor, Tensor], float], device: torch.device
) -> None:
    logits = (torch.randn(3, 5000) * 3).to(dtype)
    token_ids = torch.tensor([0, 4999, int(logits[2].argmax())])
    came = [tensor.cpu() for tensor in sampling.log_probs(logits.to(device), token_ids.to(device), k)]
    wanted = reference.log_probs(logits, token_ids, k)
    assert torch.equal(came[1], wanted[1])
    assert torch.equal(came[2], wanted[2])
    assert rel_rms(came[0], wanted[0]) < 1e-6
    assert rel_rms(came[3], wanted[3]) < 1e-6


def test_every_config(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [LIMITS[10]]
    given_ = parameters(limits)
    logits = torch.randn(len(limits), 5000) * 3
    wanted = reference.sample(logits, *given_)
    for config in sampling.candidates({}):
        monkeypatch.setattr(sampling, "config_for", lambda *_, config=config: config)
        assert torch.equal(sample(logits, given_, device), wanted)


def test_refuses_too_large_a_vocabulary(device: torch.device) -> None:
    logits = torch.zeros(1, 1).expand(1, sampling.MAX_TOKENS + 1)
    with pytest.raises(ValueError, match="a vocabulary of 1048577, must be at most 1048576"):
        sample(logits, parameters(LIMITS[:1]), device)
