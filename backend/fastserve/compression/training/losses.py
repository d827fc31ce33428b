"""Training losses: next-token and distillation losses of logits, and losses of features.

p is what the teacher expects of the next token, q what the student does, both softened by a temperature T:
p = softmax(teacher's logits / T). Divergences are multiplied by T^2, so that their gradients keep their size
whatever T is (Hinton et al., arXiv 1503.02531).

| divergence | |
|---|---|
| `forward` | KL(p, q) |
| `reverse` | KL(q, p) |
| `skewed` | KL(p, s p + (1 - s) q) |
| `skewed reverse` | KL(q, (1 - s) p + s q) |

The skewed ones, of skew s, are those of DistiLLM (Ko et al., arXiv 2402.03898).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear, log_softmax, nll_loss

Divergence = Literal["forward", "reverse", "skewed", "skewed reverse"]
CHUNK_ELEMENTS = 3 << 20
"""Logits of a model that are in memory at once: 12 MB in float32, which stay in a CPU's cache."""


def divergence(
    log_q: Tensor,
    log_p: Tensor,
    kind: Divergence = "forward",
    temperature: float = 1.0,
    skew: float = 0.1,
) -> Tensor:
    """The divergence [n] of each token in nats, times temperature^2.

    `log_q` and `log_p` [n, vocab] float32 are the log-probabilities of the student and of the teacher,
    without a temperature.
    """
    log_q, log_p = _softened(log_q, temperature), _softened(log_p, temperature)
    match kind:
        case "forward":
            nats = _kl(log_p, log_q)
        case "reverse":
            nats = _kl(log_q, log_p)
        case "skewed":
            nats = _kl(log_p, _mixture(log_p, log_q, skew))
        case "skewed reverse":
            nats = _kl(log_q, _mixture(log_q, log_p, skew))
    return nats * temperature**2


def _softened(log_p: Tensor, temperature: float) -> Tensor:
    return log_p if temperature == 1 else log_softmax(log_p / temperature, -1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p, q) = sum of p (log p - log q)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """log(share a + (1 - share) b)."""
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


@dataclass(frozen=True)
class LogitLoss:
    """A weighted sum of the next token's loss and of the divergence from the teacher."""

    next_token: float
    distillation: float
    kind: Divergence = "forward"
    temperature: float = 1.0
    skew: float = 0.1

    def __call__(self, student: Tensor, teacher: Tensor | None, next_ids: Tensor) -> Tensor:
        """The loss [n] of each token, from logits [n, vocab] and the ids [n] that follow.

        `teacher` may be None if `distillation` is 0.
        """
        log_q = log_softmax(student, -1, dtype=torch.float32)
        loss = torch.zeros(len(student), device=student.device)
        if self.next_token:
            loss = loss + self.next_token * nll_loss(log_q, next_ids, reduction="none")
        if self.distillation and teacher is not None:
            log_p = log_softmax(teacher, -1, dtype=torch.float32)
            found = divergence(log_q, log_p, self.kind, self.temperature, self.skew)
            loss = loss + self.distillation * found
        return loss


LossOfSlice = Callable[[Tensor, slice], Tensor]
"""Maps the logits [n, vocab] of a slice of the tokens to a loss of each [n]."""


def mean_logit_loss(hidden: Tensor, head: Tensor, loss: LossOfSlice) -> Tensor:
    """The mean loss of tokens, given their final hidden states [n, hidden] and the head [vocab, hidden].

    Only a few tokens' logits are in memory at once, so their gradients are computed with the loss.
    """
    mean: Tensor = _ChunkedMean.apply(hidden, head, loss)
    return mean


class _ChunkedMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, loss: LossOfSlice) -> Tensor:
        hidden_leaf = hidden.detach().requires_grad_(ctx.needs_input_grad[0])
        head_leaf = head.detach().requires_grad_(ctx.needs_input_grad[1])
        rows = max(1, CHUNK_ELEMENTS // len(head))
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            with torch.set_grad_enabled(any(ctx.needs_input_grad)):
                part = loss(linear(hidden_leaf[chunk], head_leaf), chunk).sum() / len(hidden)
            if part.requires_grad:
                part.backward()
            total += part.detach()
        ctx.save_for_backward(hidden_leaf.grad, head_leaf.grad)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if saved is None else saved * gradients[0] for saved in ctx.saved_tensors)
        return (*scaled, None)


def hidden_state_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over tokens of 2 |student - teacher|^2 / (|student|^2 + |teacher|^2), of hidden states [...,
    hidden].

    Relative, as a few tokens' states are a thousand times as long as the others'; to both, so that it is 4 at
    most: where the student alone has such a token it would be 300 of the teacher's, and the gradients of all
    other tokens be clipped away.
    """
    student, teacher = student.float(), teacher.float()
    difference = (student - teacher).square().sum(-1)
    return (2 * difference / (student.square().sum(-1) + teacher.square().sum(-1))).mean()


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over queries and heads of KL(teacher, student), of attention maps [batch, heads, T, T].

    Where the student has other heads than the teacher, both are averaged over them first.
    """
    student, teacher = student.float(), teacher.float()
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1), teacher.mean(1)
    tiny = torch.finfo(torch.float32).tiny
    return (teacher * (teacher.clamp_min(tiny).log() - student.clamp_min(tiny).log())).sum(-1).mean()
