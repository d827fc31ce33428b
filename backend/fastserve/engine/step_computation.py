"""From the sequences of a step to their next tokens: the model's forward pass, then sampling."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from fastserve.engine.compute_errors import not_finite
from fastserve.engine.model_runner import ModelRunner
from fastserve.engine.sampler import SampledToken, Sampler, SamplingState
from fastserve.errors import RequestError
from fastserve.scheduling.sequence import ScheduledSequence, Sequence, StepPlan


class StepComputation:
    """Computes steps. It changes nothing that it would not write again, so a step can be computed anew."""

    def __init__(
        self, runner: ModelRunner, sampler: Sampler, state_of: Callable[[Sequence], SamplingState]
    ) -> None:
        self._runner = runner
        self._sampler = sampler
        self._state_of = state_of

    @torch.inference_mode()
    def compute(self, items: list[ScheduledSequence]) -> list[SampledToken | None]:
        """A token for each item, or an error; None where a prompt has more chunks to come.

        With a token come the logits behind those that were proposed (`SampledToken.following`), up to the
        first that are not finite: what is wrong there is told when that token is computed for itself.
        """
        return self.sample_hidden(self._runner.run(StepPlan(items, [])), items)

    @torch.inference_mode()
    def sample_hidden(
        self, hidden: torch.Tensor, items: list[ScheduledSequence]
    ) -> list[SampledToken | None]:
        """`compute`, of the hidden states [T, hidden size] that the model gives for the items."""
        states = [self._state_of(item.sequence) for item in items]
        finite = hidden.sum(-1, dtype=torch.float32).isfinite().tolist()  # of finite numbers the sum is, too
        sampled: list[SampledToken | None] = [None] * len(items)
        rows: dict[int, range] = {}
        """By the number of each item that gets a token: in `hidden`, its last token and proposed ones."""
        end = 0
        for number, (item, state) in enumerate(zip(items, states, strict=True)):
            start, last = end, end + item.num_tokens - 1
            end = last + 1 + len(item.proposed)
            error = self._check(item, state, hidden[start : last + 1], finite[start : last + 1])
            if error is not None:
                sampled[number] = SampledToken(-1, [], error)
            elif item.is_last_chunk:
                num_following = [*finite[last + 1 : end], False].index(False)
                rows[number] = range(last, last + 1 + num_following)
        if rows:
            tokens = self._sample_first(hidden, list(rows.values()), [states[number] for number in rows])
            for number, token in zip(rows, tokens, strict=True):
                sampled[number] = token
        return sampled

    def _check(
        self, item: ScheduledSequence, state: SamplingState, hidden: torch.Tensor, finite: list[bool]
    ) -> RequestError | None:
        """What is wrong with an item's own rows; collects its prompt's log-probabilities from them."""
        if False in finite:
            return not_finite(item.sequence.num_computed_tokens + finite.index(False))
        if state.prompt_logprobs is not None:
            return state.prompt_logprobs.extend(hidden, self._runner.logits)
        return None

    def _sample_first(
        self, hidden: torch.Tensor, rows: list[range], states: list[SamplingState]
    ) -> list[SampledToken]:
        """A token for each state from the first of its rows; the logits of the others come with it."""
        first = [each[0] for each in rows]
        others = [row for each in rows for row in each[1:]]
        numbers = torch.tensor([*first, *others], device=hidden.device)
        logits = self._runner.logits(hidden[numbers])
        tokens = self._sampler.sample(logits[: len(first)], states)
        following = iter(logits[len(first) :])
        for token, each in zip(tokens, rows, strict=True):
            token.following = list(itertools.islice(following, len(each) - 1))
        return tokens

    @torch.inference_mode()
    def sample(
        self, logits: dict[Sequence, torch.Tensor], items: list[ScheduledSequence]
    ) -> list[SampledToken | None]:
        """A token for each item from the logits [vocab] of its sequence, which are not changed."""
        states = [self._state_of(item.sequence) for item in items]
        stacked = torch.stack([logits[item.sequence] for item in items])
        return list(self._sampler.sample(stacked, states))
