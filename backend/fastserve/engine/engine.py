"""The engine: plan a step, compute it, sample, say what came of it.

add / cancel -> [plan -> run -> sample -> commit -> append] -> StepOutput      (`step`, again and again)

Until the commit a step changes nothing but what it would write again: keys and values of its own tokens. So
one that raises is computed again by halves, and only the sequence that it cannot be computed with fails.
"""

from __future__ import annotations

import logging
import math
import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field

import torch

from fastserve.engine.guides import CompiledGuide, GuideCompiler
from fastserve.engine.model_runner import ModelRunner
from fastserve.engine.request_bounds import check_request
from fastserve.engine.sampler import NOT_FINITE, SampledToken, Sampler, token_logprobs
from fastserve.engine.sampling_state import SamplingState
from fastserve.errors import ErrorCode, RequestError
from fastserve.scheduling.iteration_scheduler import CacheTooSmallError, IterationScheduler
from fastserve.scheduling.policies import Policy
from fastserve.scheduling.sequence import ScheduledSequence, Sequence, StepPlan
from fastserve.types import (
    EngineStats,
    Failure,
    Outcome,
    Request,
    SequenceOutput,
    StepOutput,
    TokenLogprob,
)

logger = logging.getLogger(__name__)

GUIDE_WAIT_SECONDS = 0.01
MAX_CAUSE = 300
"""Characters of an exception's text that a client is shown."""
_STOPPED_FROM_OUTSIDE = {
    Outcome.CANCELLED: Failure(ErrorCode.CANCELLED.value, "the request was cancelled"),
    Outcome.TIMEOUT: Failure(ErrorCode.CANCELLED.value, "the request's time was over before it was finished"),
}


@dataclass(slots=True)
class _Generation:
    """What the engine keeps of a sequence besides its tokens."""

    sampling: SamplingState
    prompt_logprobs: list[list[TokenLogprob]] | None
    """Of the prompt tokens computed so far, where the request asks for them."""


@dataclass(slots=True)
class _ActiveRequest:
    request: Request
    generations: dict[int, tuple[Sequence, _Generation]] = field(default_factory=dict)
    """By sequence index; those that have not ended."""


class Engine:
    """Continuous batching of requests over one model. Not thread-safe: one thread owns it."""

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: IterationScheduler,
        policy: Policy,
        sampler: Sampler,
        guides: GuideCompiler,
        max_model_len: int,
    ) -> None:
        self.max_model_len = max_model_len
        self._runner = runner
        self._scheduler = scheduler
        self._policy = policy
        self._sampler = sampler
        self._guides = guides
        self._preparing: dict[str, tuple[Request, Future[CompiledGuide]]] = {}
        """Requests whose guide is being compiled."""
        self._active: dict[str, _ActiveRequest] = {}
        self._received = 0
        self._endings: list[SequenceOutput] = []
        """Of sequences that ended outside a step; they leave with the next one."""
        self._is_unchecked = False
        """Whether the books have changed since they were checked."""

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do; when the last request has ended, that is to check the books."""
        return bool(self._active or self._preparing or self._endings or self._is_unchecked)

    def add(self, request: Request) -> None:
        """Takes a request in. One that cannot be served ends with a failure at the next step."""
        self._received += 1
        if request.uid in self._active or request.uid in self._preparing:
            raise ValueError(f"request {request.uid} is being served already")
        try:
            check_request(request, self._runner.model.vocab_size, self.max_model_len)
        except RequestError as error:
            self._fail(request, error)
            return
        if request.sampling.guide is None:
            self._start(request, None)
        else:
            self._preparing[request.uid] = (request, self._guides.compile(request.sampling.guide))

    def _start(self, request: Request, guide: CompiledGuide | None) -> None:
        active = self._active[request.uid] = _ActiveRequest(request)
        key = self._policy.key(request.priority, request.arrival)
        for index in range(request.sampling.n):
            sequence = Sequence(request, index, key, token_ids=list(request.prompt_token_ids))
            wants_prompt = request.sampling.prompt_logprobs is not None and index == 0
            generation = _Generation(self._sampler.start(sequence, guide), [[]] if wants_prompt else None)
            active.generations[index] = (sequence, generation)
            self._scheduler.add(sequence)

    def _fail(self, request: Request, error: RequestError) -> None:
        self._endings += [_failed(request.uid, index, error) for index in range(request.sampling.n)]

    def cancel(self, uid: str, outcome: Outcome, index: int | None = None) -> None:
        """Stops a request, or one sequence of it; nothing happens if it is not being served."""
        failure = _STOPPED_FROM_OUTSIDE.get(outcome)
        if uid in self._preparing:
            request, _ = self._preparing.pop(uid)
            self._endings += [
                SequenceOutput(uid, i, outcome=outcome, failure=failure) for i in range(request.sampling.n)
            ]
        active = self._active.get(uid)
        if active is None:
            return
        for each in list(active.generations) if index is None else [index]:
            if each in active.generations:
                self._remove(active, each)
                self._endings.append(SequenceOutput(uid, each, outcome=outcome, failure=failure))

    def _remove(self, active: _ActiveRequest, index: int) -> None:
        del active.generations[index]
        self._scheduler.remove(active.request.uid, index)
        if not active.generations:
            del self._active[active.request.uid]

    def step(self) -> StepOutput:
        """One iteration: computes what the scheduler plans, and returns what it brought to every request.

        Raises what the model raised if the device no longer computes anything, and BlockPoolError or
        SchedulerError if blocks or sequences are left over when the last request has ended.
        """
        self._expire(time.monotonic())
        self._start_prepared()
        self._check_when_idle()
        plan = self._plan()
        outputs = self._compute(plan) if plan.scheduled else []
        outputs += self._endings
        self._endings = []
        return StepOutput(outputs, self.stats(plan.num_tokens))

    def _check_when_idle(self) -> None:
        """Nothing is held then, and nobody waits for the time that it takes."""
        if self._is_unchecked and not self._active:
            self._scheduler.check()
            self._is_unchecked = False

    def _plan(self) -> StepPlan:
        while True:
            try:
                return self._scheduler.plan()
            except CacheTooSmallError as error:
                self._endings += self._fail_active(error.sequence, RequestError(str(error)))

    def _expire(self, now: float) -> None:
        requests = [active.request for active in self._active.values()]
        requests += [request for request, _ in self._preparing.values()]
        for request in requests:
            if request.deadline is not None and request.deadline <= now:
                self.cancel(request.uid, Outcome.TIMEOUT)

    def _start_prepared(self) -> None:
        """Starts those whose guide is compiled; waits a little for one if there is nothing else to do."""
        if not self._preparing:
            return
        wait(
            [future for _, future in self._preparing.values()],
            0 if self._active else GUIDE_WAIT_SECONDS,
            FIRST_COMPLETED,
        )
        self._guides.abandon_heavy()
        for uid, (request, future) in list(self._preparing.items()):
            if future.done():
                del self._preparing[uid]
                try:
                    self._start(request, future.result())
                except RequestError as error:
                    self._fail(request, error)

    def _compute(self, plan: StepPlan) -> list[SequenceOutput]:
        self._is_unchecked = True
        computed = self._compute_isolated(plan.scheduled)
        failed = {item.sequence: token.error for item, token in computed if token and token.error}
        self._scheduler.commit(StepPlan([item for item, _ in computed if item.sequence not in failed], []))
        outputs = []
        for sequence, error in failed.items():
            outputs += self._fail_active(sequence, error)
        for item, token in computed:
            if token is not None and item.sequence.request.uid in self._active:
                outputs += self._advance(item.sequence, token)
        return outputs

    def _compute_isolated(
        self, items: list[ScheduledSequence]
    ) -> list[tuple[ScheduledSequence, SampledToken | None]]:
        """As `_forward`, but a sequence with which it raises gets an error, and the others their tokens.

        Raises what `_forward` raised if the device does not compute what is known to work either.
        """
        try:
            return list(zip(items, self._forward(items), strict=True))
        except Exception as error:
            self._require_device(error)
            if len(items) > 1:
                middle = len(items) // 2
                return self._compute_isolated(items[:middle]) + self._compute_isolated(items[middle:])
            uid = items[0].sequence.request.uid
            logger.exception("request %s cannot be computed; it fails, and the others go on", uid)
            return [(items[0], SampledToken(-1, [], _not_computed(error)))]

    def _require_device(self, error: Exception) -> None:
        """Raises `error` if the model cannot even compute one harmless token."""
        try:
            self._runner.probe()
        except Exception:
            raise error from None

    @torch.inference_mode()
    def _forward(self, items: list[ScheduledSequence]) -> list[SampledToken | None]:
        """Computes the items: a token for each, or an error; None where a prompt has more chunks to come."""
        hidden, metadata = self._runner.run(StepPlan(items, []))
        sampled: list[SampledToken | None] = [None] * len(items)
        first_row = 0
        finite = _are_finite(hidden)
        for place, item in enumerate(items):
            last_row = first_row + item.num_tokens
            if False in finite[first_row:last_row]:
                position = item.sequence.num_computed_tokens + finite[first_row:last_row].index(False)
                sampled[place] = SampledToken(-1, [], _not_finite(position))
            elif (collected := self._generation(item.sequence).prompt_logprobs) is not None:
                error = self._extend_prompt_logprobs(item, collected, hidden[first_row:last_row])
                if error is not None:
                    sampled[place] = SampledToken(-1, [], error)
            first_row = last_row
        places = [i for i, item in enumerate(items) if item.is_last_chunk and sampled[i] is None]
        if places:
            last = metadata.last_token_index[torch.tensor(places, device=hidden.device)]
            sequences = [items[place].sequence for place in places]
            tokens = self._sampler.sample(
                self._runner.model.logits(hidden[last]),
                sequences,
                [self._generation(sequence).sampling for sequence in sequences],
            )
            for place, token in zip(places, tokens, strict=True):
                sampled[place] = token
        return sampled

    def _generation(self, sequence: Sequence) -> _Generation:
        return self._active[sequence.request.uid].generations[sequence.index][1]

    def _extend_prompt_logprobs(
        self, item: ScheduledSequence, collected: list[list[TokenLogprob]], hidden: torch.Tensor
    ) -> RequestError | None:
        """Adds those of the chunk `hidden` [item.num_tokens, hidden size].

        The row of a position tells of the token after it. What is computed again, after a preemption or in a
        step that raised, is there already. Returns an error if the model's numbers are not finite.
        """
        sequence = item.sequence
        start = sequence.num_computed_tokens
        first = max(start, len(collected) - 1)
        last = min(start + item.num_tokens, sequence.num_prompt_tokens - 1)
        if first >= last:
            return None
        logits = self._runner.model.logits(hidden[first - start : last - start])
        targets = torch.tensor(sequence.token_ids[first + 1 : last + 1], device=logits.device)
        count = sequence.request.sampling.prompt_logprobs or 0
        found = token_logprobs(logits, targets, [count] * (last - first))
        for place, entries in enumerate(found):
            if math.isnan(entries[0][1]):
                return _not_finite(first + place)
        collected += found
        return None

    def _advance(self, sequence: Sequence, token: SampledToken) -> list[SequenceOutput]:
        """Gives a sequence its new token, and ends it if that was the last one, or if it cannot be booked."""
        try:
            error = self._generation(sequence).sampling.append(token.token_id)
            if error is None:
                return [self._append(sequence, token)]
        except Exception as failure:
            logger.exception("request %s fails, and the others go on", sequence.request.uid)
            error = _not_computed(failure)
        return self._fail_active(sequence, error)

    def _fail_active(self, sequence: Sequence, error: RequestError) -> list[SequenceOutput]:
        """Ends the whole request of a sequence: its client gets an error in place of what is left to come."""
        active = self._active.get(sequence.request.uid)
        if active is None:
            return []  # it failed already in this step, by another of its sequences
        outputs = []
        for index in list(active.generations):
            self._remove(active, index)
            outputs.append(_failed(sequence.request.uid, index, error))
        return outputs

    def _append(self, sequence: Sequence, token: SampledToken) -> SequenceOutput:
        request = sequence.request
        active = self._active[request.uid]
        generation = active.generations[sequence.index][1]
        is_first = sequence.num_generated_tokens == 0
        sequence.token_ids.append(token.token_id)
        outcome = self._outcome(sequence, generation.sampling)
        if outcome is not None:
            self._remove(active, sequence.index)
        return SequenceOutput(
            request.uid,
            sequence.index,
            token_ids=[token.token_id],
            logprobs=[token.logprobs] if token.logprobs else [],
            prompt_logprobs=generation.prompt_logprobs if is_first else None,
            num_cached_tokens=sequence.num_cached_tokens if is_first else 0,
            outcome=outcome,
        )

    def _outcome(self, sequence: Sequence, state: SamplingState) -> Outcome | None:
        ended = sequence.num_generated_tokens >= sequence.request.sampling.min_tokens and (
            sequence.token_ids[-1] in state.stop_token_ids
        )
        if ended or (state.matcher is not None and state.matcher.is_complete):
            return Outcome.STOP
        if sequence.num_generated_tokens >= sequence.request.sampling.max_tokens:
            return Outcome.LENGTH
        return Outcome.LENGTH if sequence.num_tokens >= self.max_model_len else None

    def stats(self, step_tokens: int = 0) -> EngineStats:
        """The state after a step that computed `step_tokens` tokens.

        Requests whose guide is being compiled have their slots already.
        """
        scheduler = self._scheduler
        preparing = sum(request.sampling.n for request, _ in self._preparing.values())
        return EngineStats(
            received=self._received,
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            free_slots=scheduler.free_slots - preparing,
            lowest_key=scheduler.lowest_key,
            kv_blocks_total=scheduler.pool.num_blocks,
            kv_blocks_used=scheduler.pool.num_used,
            step_tokens=step_tokens,
            preemptions_total=scheduler.num_preemptions,
            prefix_cache_hit_tokens_total=scheduler.num_prefix_cache_hit_tokens,
        )


def _failed(uid: str, index: int, error: RequestError) -> SequenceOutput:
    return SequenceOutput(
        uid, index, outcome=Outcome.ERROR, failure=Failure(code=error.code.value, message=str(error))
    )


def _not_computed(error: Exception) -> RequestError:
    """The client does not send such a request again: it would only fail again."""
    cause = f"{type(error).__name__}: {error}"[:MAX_CAUSE]
    return RequestError(f"the model cannot compute this request: {cause}", ErrorCode.INTERNAL)


def _not_finite(position: int) -> RequestError:
    return RequestError(NOT_FINITE.format(position=position), ErrorCode.INTERNAL)


def _are_finite(hidden: torch.Tensor) -> list[bool]:
    """For each row [T, hidden size] whether all its numbers are; a sum of such numbers is finite, too."""
    return hidden.sum(-1, dtype=torch.float32).isfinite().tolist()
