"""The steps that are being computed: one, or, where the model is cut into stages, one for each of them.

Stages work at different steps at the same time. So the next step is planned before the tokens of the one
before are known, of sequences that no step has which is computed still: of running ones each has a part, and
they take turns.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastserve.engine.model_runner import ModelRunner
from fastserve.engine.sampler import SampledToken
from fastserve.engine.step_computation import StepComputation
from fastserve.scheduling.iteration_scheduler import IterationScheduler
from fastserve.scheduling.sequence import ScheduledSequence, StepPlan


@dataclass(eq=False)
class MicroBatch:
    """A plan that is being computed."""

    plan: StepPlan
    hidden: Callable[[], torch.Tensor]
    """See `ModelRunner.start`."""
    started: float
    """By `time.perf_counter`."""
    has_prompts: bool


@dataclass(frozen=True)
class ComputedBatch:
    """A micro-batch whose tokens can be had."""

    plan: StepPlan
    """Without the sequences that have left the batch meanwhile."""
    compute: Callable[[list[ScheduledSequence]], list[SampledToken | None]]
    """See `StepComputation.compute`; for the items of `plan` it takes what is computed already."""
    has_prompts: bool
    started: float
    """When it was begun."""
    alone_since: float
    """From when on it was the oldest: until then others were finished."""


class MicroBatches:
    """Those that are being computed, the oldest first; as many at most as the scheduler has."""

    def __init__(
        self, runner: ModelRunner, computation: StepComputation, scheduler: IterationScheduler
    ) -> None:
        self._runner = runner
        self._computation = computation
        self._scheduler = scheduler
        self._batches: deque[MicroBatch] = deque()
        self._last_taken = 0.0

    def __len__(self) -> int:
        return len(self._batches)

    def start(self, plan: StepPlan) -> None:
        """Begins to compute a plan."""
        started, has_prompts = time.perf_counter(), plan.num_prompt_tokens > 0
        batch = MicroBatch(plan, self._runner.start(plan), started, has_prompts)
        self._batches.append(batch)
        self._scheduler.in_flight |= dict.fromkeys([item.sequence for item in plan.scheduled], batch)

    def take(self, has_more: bool) -> ComputedBatch | None:
        """The oldest; None if there is none, or if another can be begun before it is waited for: after a step
        for which there was something to plan (`has_more`)."""
        if not self._batches or (has_more and len(self._batches) < self._scheduler.num_micro_batches):
            return None
        batch, in_flight = self._batches.popleft(), self._scheduler.in_flight
        is_kept = [in_flight.get(item.sequence) is batch for item in batch.plan.scheduled]
        kept = [item for item, is_one in zip(batch.plan.scheduled, is_kept, strict=True) if is_one]
        for item in kept:
            del in_flight[item.sequence]
        if not kept:
            batch.hidden()  # the results come in order

        def compute(items: list[ScheduledSequence]) -> list[SampledToken | None]:
            if items is not kept:  # some of them, again: see `compute_isolated`
                return self._computation.compute(items)
            hidden = batch.hidden()
            if len(kept) < len(batch.plan.scheduled):
                hidden = hidden[_rows(batch.plan.scheduled, is_kept)]
            return self._computation.sample_hidden(hidden, kept)

        alone_since = max(batch.started, self._last_taken)
        return ComputedBatch(StepPlan(kept, []), compute, batch.has_prompts, batch.started, alone_since)

    def finish(self) -> None:
        """The tokens of the batch that was taken are drawn."""
        self._last_taken = time.perf_counter()


def _rows(items: list[ScheduledSequence], is_kept: list[bool]) -> torch.Tensor:
    """Which rows of hidden states are those of the items that are kept."""
    counts = torch.tensor([item.num_tokens + len(item.proposed) for item in items])
    return torch.tensor(is_kept).repeat_interleave(counts)
