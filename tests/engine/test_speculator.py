"""Guesses are proposed where the step times and acceptances that were measured say that they pay."""

from __future__ import annotations

from typing import Any

import pytest

from fastserve.engine.speculator import Speculator
from fastserve.scheduling.sequence import ScheduledSequence, Sequence, StepPlan
from fastserve.types import view_of

PASSAGE = [*range(10, 40)]


class Batch:
    """Sequences that a speculator meets step by step; a step takes `base + per_row * rows` seconds."""

    def __init__(self, helpers: Any, size: int, base: float, per_row: float, **settings: Any) -> None:
        self.speculator = Speculator(
            **{"num_speculative_tokens": 8, "max_rows": 64, "max_model_len": 4096} | settings
        )
        self._base, self._per_row = base, per_row
        self.sequences = []
        for number in range(size):
            request = helpers.make_request(f"{number}", PASSAGE * 2, max_tokens=2000)
            self.sequences.append(Sequence(request, 0, view_of(request), PASSAGE * 2, len(PASSAGE) * 2 - 1))
        self.num_rows = self.num_tokens = 0
        self.seconds = 0.0

    def step(self, is_right: bool) -> list[int]:
        """The number of guesses for each; then its next token is the one that was guessed, or is not, and is
        in any case the passage's next."""
        plan = StepPlan([ScheduledSequence(each, 1) for each in self.sequences], [])
        plan = self.speculator.extend(plan, lambda sequence, count: count)
        self.speculator.observe_step(plan, self._base + self._per_row * plan.num_tokens)
        self.seconds += self._base + self._per_row * plan.num_tokens
        for item in plan.scheduled:
            accepted = len(item.proposed) if is_right else 0
            if item.proposed:
                self.speculator.observe(item, accepted)
            for _ in range(accepted + 1):
                item.sequence.token_ids.append(PASSAGE[item.sequence.num_tokens % len(PASSAGE)])
                item.sequence.num_computed_tokens += 1
                self.num_tokens += 1
        return [len(item.proposed) for item in plan.scheduled]

    def steps(self, count: int, is_right: bool) -> list[list[int]]:
        return [self.step(is_right) for _ in range(count)]


def test_guesses_that_are_right_become_as_many_as_may_be(helpers: Any) -> None:
    batch = Batch(helpers, 1, 0.003, 0.0005)
    counts = batch.steps(30, is_right=True)
    assert counts[0] == [1]  # nothing is known yet
    assert counts[-10:] == [[8]] * 10
    assert batch.num_tokens / batch.seconds > 3 / 0.0035


def test_guesses_that_are_wrong_cost_little(helpers: Any) -> None:
    batch = Batch(helpers, 1, 0.003, 0.0005)
    batch.steps(50, is_right=False)
    before = batch.speculator.num_draft_tokens
    counts = batch.steps(1000, is_right=False)
    assert (
        2 <= batch.speculator.num_draft_tokens - before <= 10
    )  # it looks now and then whether that has changed
    assert max(counts) == [1]


def test_it_comes_back_when_guesses_are_right_again(helpers: Any) -> None:
    batch = Batch(helpers, 1, 0.003, 0.0005)
    batch.steps(100, is_right=False)
    assert batch.steps(150, is_right=True)[-1] == [8]


def test_nothing_is_proposed_where_a_row_costs_what_it_brings(helpers: Any) -> None:
    batch = Batch(helpers, 16, 0.0, 0.001)
    batch.steps(50, is_right=True)
    before, num_tokens = batch.speculator.num_draft_tokens, batch.num_tokens
    batch.steps(100, is_right=False)
    assert batch.speculator.num_draft_tokens - before <= 0.06 * (batch.num_tokens - num_tokens)


def test_the_sequence_that_quotes_gets_the_rows(helpers: Any) -> None:
    batch = Batch(helpers, 2, 0.003, 0.001)
    for _ in range(20):
        batch.steps(1, is_right=True)
    _, other = batch.sequences
    for _ in range(10):
        batch.speculator.observe(ScheduledSequence(other, 1, (1,)), 0)
    plan = StepPlan([ScheduledSequence(each, 1) for each in batch.sequences], [])
    plan = batch.speculator.extend(plan, lambda sequence, count: count)
    assert [len(item.proposed) for item in plan.scheduled] == [8, 1]


def test_a_step_has_no_more_rows_than_it_may(helpers: Any) -> None:
    batch = Batch(helpers, 3, 0.003, 0.0, max_rows=10)
    assert max(sum(each) for each in batch.steps(50, is_right=True)) == 7


def test_no_guess_makes_a_step_longer_than_the_target(helpers: Any) -> None:
    batch = Batch(helpers, 1, 0.003, 0.0005, target_itl_seconds=0.0062)
    counts = batch.steps(60, is_right=True)
    assert counts[-30:] == [[5]] * 30


@pytest.mark.parametrize(("left", "expected"), [(1, 0), (2, 1), (5, 4), (100, 8)])
@pytest.mark.parametrize("by_length", [False, True])
def test_no_guess_lies_behind_the_last_token(helpers: Any, left: int, expected: int, by_length: bool) -> None:
    batch = Batch(helpers, 1, 0.003, 0.0, max_model_len=2 * len(PASSAGE) + left if by_length else 4096)
    (sequence,) = batch.sequences
    if not by_length:
        sequence.request = helpers.make_request("0", PASSAGE * 2, max_tokens=left)
    batch.speculator.observe_step(StepPlan([ScheduledSequence(sequence, 1)], []), 0.003)
    batch.speculator.observe_step(StepPlan([ScheduledSequence(sequence, 1)], []), 0.003)
    plan = StepPlan([ScheduledSequence(sequence, 1)], [])
    plan = batch.speculator.extend(plan, lambda sequence, count: count)
    assert plan.scheduled[0].proposed == tuple(PASSAGE[:expected])


def test_a_step_with_prompts_gets_none(helpers: Any) -> None:
    batch = Batch(helpers, 1, 0.003, 0.0)
    request = helpers.make_request("new", PASSAGE * 2, max_tokens=9)
    items = [ScheduledSequence(batch.sequences[0], 1)]
    assert batch.speculator.extend(StepPlan(items, []), lambda sequence, count: count).num_tokens == 2
    items.append(ScheduledSequence(Sequence(request, 0, view_of(request), PASSAGE * 2), 30))
    assert batch.speculator.extend(StepPlan(items, []), lambda sequence, count: count).num_tokens == 31


def test_nothing_is_proposed_where_the_operator_wants_none(helpers: Any) -> None:
    batch = Batch(helpers, 1, 0.003, 0.0, num_speculative_tokens=0)
    assert batch.steps(20, is_right=True) == [[0]] * 20
