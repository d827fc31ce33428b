"""Losses: the formulas against torch's own, chunks against the whole, features."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, linear

from fastserve.compression.training import losses
from fastserve.compression.training.losses import (
    Divergence,
    LogitLoss,
    attention_loss,
    divergence,
    hidden_state_loss,
    mean_logit_loss,
)

KINDS: tuple[Divergence, ...] = ("forward", "reverse", "skewed", "skewed reverse")
seeds = st.integers(0, 2**31)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(seeds, st.floats(0.5, 4), st.floats(0.01, 0.99), st.sampled_from(KINDS))
def test_a_divergence_is_torchs_of_the_softened_probabilities(
    seed: int, temperature: float, skew: float, kind: Divergence
) -> None:
    student, teacher = 3 * random(seed, 5, 11), 3 * random(seed + 1, 5, 11)
    q, p = ((logits / temperature).softmax(-1).double() for logits in (student, teacher))
    target, found = {
        "forward": (p, q),
        "reverse": (q, p),
        "skewed": (p, skew * p + (1 - skew) * q),
        "skewed reverse": (q, (1 - skew) * p + skew * q),
    }[kind]
    expected = kl_div(found.log(), target, reduction="none").sum(-1) * temperature**2
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    nats = divergence(log_q, log_p, kind, temperature, skew)
    torch.testing.assert_close(nats.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_divergence_from_itself_is_zero_and_so_is_its_gradient(kind: Divergence) -> None:
    logits = random(0, 4, 9).requires_grad_()
    log_q = logits.log_softmax(-1)
    nats = divergence(log_q, log_q.detach(), kind)
    nats.sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(nats.detach(), torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(logits.grad, torch.zeros(4, 9), atol=1e-6, rtol=0)


def test_the_next_tokens_loss_needs_no_teacher() -> None:
    logits, ids = random(0, 6, 7), torch.arange(6)
    found = LogitLoss(next_token=2.0, distillation=0.0)(logits, None, ids)
    torch.testing.assert_close(found, 2 * cross_entropy(logits, ids, reduction="none"))


def test_losses_are_summed_by_their_weights() -> None:
    student, teacher, ids = random(0, 6, 7), random(1, 6, 7), torch.arange(6)
    found = LogitLoss(0.25, 0.5, "reverse", 2.0)(student, teacher, ids)
    expected = 0.25 * cross_entropy(student, ids, reduction="none")
    expected += 0.5 * divergence(student.log_softmax(-1), teacher.log_softmax(-1), "reverse", 2.0)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("trained", [(True, False), (False, True), (True, True)])
def test_chunks_give_the_loss_and_the_gradients_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, trained: tuple[bool, bool]
) -> None:
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 3 * 12)
    ids = torch.arange(10)
    results = []
    for chunked in (True, False):
        hidden = random(0, 10, 8).requires_grad_(trained[0])
        head = random(1, 12, 8).requires_grad_(trained[1])
        if chunked:
            loss = mean_logit_loss(hidden, head, lambda x, c: cross_entropy(x, ids[c], reduction="none"))
        else:
            loss = cross_entropy(linear(hidden, head), ids)
        (2 * loss).backward()
        results.append([loss.detach(), *(x.grad for x in (hidden, head) if x.grad is not None)])
    assert len(results[0]) == 1 + sum(trained)
    torch.testing.assert_close(results[0], results[1])


def test_chunks_keep_no_gradients_where_none_are_wanted() -> None:
    hidden, head = random(0, 5, 8).requires_grad_(), random(1, 12, 8)
    with torch.no_grad():
        loss = mean_logit_loss(hidden, head, lambda x, _: x.sum(-1))
    assert not loss.requires_grad
    torch.testing.assert_close(loss, (hidden @ head.T).sum(-1).mean().detach())


def test_the_loss_of_hidden_states_is_relative_to_each_token() -> None:
    teacher = torch.tensor([[3.0, 4.0], [300.0, 400.0]])
    expected = 2 * 0.25 / (1 + 1.5**2)
    assert hidden_state_loss(1.5 * teacher, teacher).item() == pytest.approx(expected)


def test_no_token_outweighs_the_others_in_the_loss_of_hidden_states() -> None:
    teacher = random(0, 2, 8)
    student = torch.stack((teacher[0], 1000 * teacher[1])).requires_grad_()
    loss = hidden_state_loss(student, teacher)
    loss.backward()
    assert loss.item() <= 4 / 2
    assert student.grad is not None
    assert student.grad.norm() < 0.1


def test_the_loss_of_attention_maps_is_their_divergence() -> None:
    teacher, student = torch.tensor([[[[0.5, 0.5]]]]), torch.tensor([[[[0.25, 0.75]]]])
    expected = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    assert attention_loss(student, teacher).item() == pytest.approx(expected)


def test_attention_maps_of_other_heads_are_compared_by_their_mean() -> None:
    teacher = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    student = torch.tensor([[[[0.5, 0.5]]]])
    assert attention_loss(student, teacher).item() == pytest.approx(0, abs=1e-6)


def test_masked_places_of_attention_maps_give_finite_gradients() -> None:
    student = torch.tensor([[[[1.0, 0.0]]]], requires_grad=True)
    attention_loss(student, torch.tensor([[[[1.0, 0.0]]]])).backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
