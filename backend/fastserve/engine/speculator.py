"""Speculative decoding: several tokens of a sequence in one step, where that is measured to pay.

A step that computes a sequence's last token computes guesses of those that follow along with it, as if all
were a chunk of a prompt, so that the logits behind each guess are there. Then tokens are drawn one by one as
ever: with the random number of their position, from the logits as the request's parameters and the tokens
before change them. While the token that is drawn is the one that was guessed, the next can be drawn, too
(`Speculator.verify`).

So the tokens are those that come without speculation, greedy or drawn, whatever is proposed: on a CPU to
the last bit, since there a token's numbers do not depend on what is computed along with it. This is also the
rejection rule of Leviathan et al. (arXiv 2211.17192) for a guess x that is certain of itself, q(x) = 1:
it is to be accepted with probability min(1, p(x) / q(x)) = p(x), and if it is not, a token is to be drawn
from max(0, p - q), normed, which is p without x. To draw from p and to compare with x does both.

Each guess is one row more in the step. It is right only if all before it are: the i-th with probability
a^i, where a is measured of each sequence (`Draft`). A step of r rows that brings E tokens in the mean takes
T(r) seconds, which are measured too (`StepSeconds`). A guess is worth its row if it raises the tokens per
second: (E + a^i) / T(r + 1) > E / T(r). So do Liu et al., "Optimizing Speculative Decoding for Serving Large
Language Models Using Goodput" (arXiv 2406.14066). In a batch where a row costs what it brings nothing is
proposed, but for one guess now and then, to see whether that has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from fastserve.engine.draft import Draft
from fastserve.engine.sampler import SampledToken
from fastserve.engine.step_seconds import StepSeconds
from fastserve.engine.verification import Verification
from fastserve.scheduling.sequence import ScheduledSequence, Sequence, StepPlan

MARGIN = 1.1
"""What is measured is not exact: a guess that brings less than this above its cost is not worth it."""
Reserve = Callable[[Sequence, int], int]
"""Makes room for so many tokens beyond a sequence's own; returns for how many there is."""
IsActive = Callable[[Sequence], bool]
"""Whether a sequence has not ended."""
Draw = Callable[[dict[Sequence, torch.Tensor]], list[SampledToken | None]]
"""Draws a token of each sequence from its logits [vocab], and takes it."""


class Speculator:
    """Decides which sequences of a step get how many guesses."""

    def __init__(
        self,
        num_speculative_tokens: int,
        max_rows: int,
        max_model_len: int,
        target_itl_seconds: float = 0.0,
    ) -> None:
        """`num_speculative_tokens`: guesses of a sequence in a step, at most; 0: none. `max_rows`: tokens of
        a step, the guesses among them. `target_itl_seconds`: no guess makes a step longer; 0: no target."""
        self._num_speculative_tokens = num_speculative_tokens
        self._max_rows = max_rows
        self._max_model_len = max_model_len
        self._target = target_itl_seconds
        self._step_seconds = StepSeconds()
        self._drafts: dict[Sequence, Draft] = {}
        self._trials: set[Sequence] = set()
        """Sequences whose guess in this step is not worth its row, but for what it tells."""
        self.num_draft_tokens = 0
        """Guesses that were computed."""
        self.num_accepted_tokens = 0
        """Those of them that became tokens of an answer."""

    def extend(self, plan: StepPlan, reserve: Reserve) -> StepPlan:
        """The plan, its sequences with the guesses that they get; none beside prompts, which would wait."""
        sequences = [item.sequence for item in plan.scheduled]
        self._trials.difference_update(sequences)
        if plan.num_prompt_tokens > 0:
            return plan
        guesses = [self._guess(sequence) for sequence in sequences]
        if not any(guesses):
            return plan
        counts = self._choose(sequences, guesses)
        scheduled = [
            item._replace(proposed=tuple(guess[: reserve(item.sequence, count)])) if count else item
            for item, guess, count in zip(plan.scheduled, guesses, counts, strict=True)
        ]
        return replace(plan, scheduled=scheduled)

    def _guess(self, sequence: Sequence) -> list[int]:
        """All that could be proposed. The last token of an answer is followed by none."""
        params = sequence.request.sampling
        left = min(
            params.max_tokens - sequence.num_generated_tokens, self._max_model_len - sequence.num_tokens
        )
        count = min(self._num_speculative_tokens, left - 1)
        if count < 1:
            return []
        draft = self._drafts.get(sequence)
        if draft is None:
            draft = self._drafts[sequence] = Draft(sequence)
        return draft.propose(count)

    def _choose(self, sequences: list[Sequence], guesses: list[list[int]]) -> list[int]:
        """How many guesses each sequence gets: the most probable first, while they are worth their rows."""
        candidates = [
            (self._drafts[sequence].acceptance ** place, number)
            for number, (sequence, guess) in enumerate(zip(sequences, guesses, strict=True))
            for place in range(1, len(guess) + 1)
        ]
        num_rows, num_expected = len(sequences), float(len(sequences))
        counts = [0] * len(sequences)
        for probability, number in sorted(candidates, reverse=True):
            if not self._is_worth(probability, num_expected, num_rows):
                break
            counts[number] += 1
            num_expected += probability
            num_rows += 1
        for number, guess in enumerate(guesses):
            if guess and not counts[number] and num_rows < self._max_rows:
                counts[number] = 1
                num_rows += 1
                self._trials.add(sequences[number])
        return counts

    def _is_worth(self, probability: float, num_expected: float, num_rows: int) -> bool:
        """Whether a guess of that probability raises the tokens per second of a step."""
        seconds, per_row = self._step_seconds.of(num_rows), self._step_seconds.per_row
        if num_rows >= self._max_rows or (self._target and seconds + per_row > self._target):
            return False
        return probability * seconds > MARGIN * per_row * num_expected

    def verify(
        self,
        items: list[ScheduledSequence],
        tokens: list[SampledToken | None],
        is_active: IsActive,
        draw: Draw,
    ) -> None:
        """Has the tokens behind proposals that were right drawn, a position at a time; learns how many were.

        `tokens`: the step's own, which have been taken.
        """
        pairs = zip(items, tokens, strict=True)
        verifications = [Verification(item, token) for item, token in pairs if token and item.proposed]
        left = verifications
        while left := [each for each in left if is_active(each.item.sequence) and each.accept()]:
            drawn = draw({each.item.sequence: each.logits for each in left})
            for each, token in zip(left, drawn, strict=True):
                each.token = token
        for each in verifications:
            self.observe(each.item, each.num_accepted)

    def observe_step(self, plan: StepPlan, seconds: float) -> None:
        """Learns how long a plan without prompts has taken, the drawing of its tokens included."""
        self._step_seconds.observe(plan.num_tokens, seconds)

    def observe(self, item: ScheduledSequence, num_accepted: int) -> None:
        """Learns how many of a sequence's guesses were right."""
        num_proposed, is_trial = len(item.proposed), item.sequence in self._trials
        self.num_draft_tokens += num_proposed
        self.num_accepted_tokens += num_accepted
        if (draft := self._drafts.get(item.sequence)) is not None:
            draft.observe(num_proposed, num_accepted, is_trial)

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended here."""
        self._drafts.pop(sequence, None)
        self._trials.discard(sequence)
