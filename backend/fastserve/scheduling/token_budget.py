"""The token budget of a step: whom it reaches, and how it is shared out."""

from __future__ import annotations

from fastserve.scheduling.policies.policy import Rank
from fastserve.scheduling.sequence import ScheduledSequence, Sequence


def order_of(sequence: Sequence) -> tuple[Rank, float, int]:
    """The lowest goes first: by the policy's rank, then by arrival, then by index."""
    return (sequence.rank, sequence.request.arrival, sequence.index)


def reaches_budget(newcomer: Sequence, staying: list[Sequence], budget: int) -> bool:
    """Whether so many tokens would reach a newcomer: decodes and prompts of higher rank come first."""
    order = order_of(newcomer)
    claimed = 0
    for sequence in staying:
        missing = sequence.num_tokens - sequence.num_computed_tokens
        if missing == 1 or order_of(sequence) <= order:
            claimed += missing
    return claimed < budget


def share_budget(running: list[Sequence], budget: int) -> list[ScheduledSequence]:
    """Decodes, then chunks of prompts; both by rank, in which `running` is."""
    scheduled, prompts = [], []
    for sequence in running:
        if sequence.num_tokens - sequence.num_computed_tokens == 1:
            scheduled.append(ScheduledSequence(sequence, 1))
        else:
            prompts.append(sequence)
    budget -= len(scheduled)
    for sequence in prompts:
        if budget == 0:
            break
        chunk = min(budget, sequence.num_tokens - sequence.num_computed_tokens)
        scheduled.append(ScheduledSequence(sequence, chunk))
        budget -= chunk
    return scheduled
