"""The engine: plan a step, compute it, sample, say what came of it.

add / cancel -> [plan -> run -> commit -> sample -> append] -> StepOutput      (`step`, again and again)
"""

from __future__ import annotations

import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field

import torch

from fastserve.engine.guides import CompiledGuide, GuideCompiler
from fastserve.engine.model_runner import ModelRunner
from fastserve.engine.sampler import SampledToken, Sampler, SamplingState, token_logprobs
from fastserve.errors import ErrorCode, RequestError, prompt_too_long
from fastserve.scheduling.iteration_scheduler import IterationScheduler
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
from fastserve_kernels.attention_metadata import AttentionMetadata

GUIDE_WAIT_SECONDS = 0.01
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

    @property
    def has_work(self) -> bool:
        return bool(self._active or self._preparing or self._endings)

    def add(self, request: Request) -> None:
        """Takes a request in. One that cannot be served ends with a failure at the next step."""
        self._received += 1
        if request.uid in self._active or request.uid in self._preparing:
            raise ValueError(f"request {request.uid} is being served already")
        try:
            self._check_length(request)
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

    def _check_length(self, request: Request) -> None:
        if len(request.prompt_token_ids) >= self.max_model_len:
            raise prompt_too_long(len(request.prompt_token_ids), self.max_model_len)

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
        """One iteration: computes what the scheduler plans, and returns what it brought to every request."""
        self._expire(time.monotonic())
        self._start_prepared()
        plan = self._scheduler.plan()
        outputs = self._compute(plan) if plan.scheduled else []
        outputs += self._endings
        self._endings = []
        return StepOutput(outputs, self.stats(plan.num_tokens))

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
        for uid, (request, future) in list(self._preparing.items()):
            if future.done():
                del self._preparing[uid]
                try:
                    self._start(request, future.result())
                except RequestError as error:
                    self._fail(request, error)

    def _compute(self, plan: StepPlan) -> list[SequenceOutput]:
        hidden, metadata = self._runner.run(plan)
        self._collect_prompt_logprobs(plan, hidden)
        rows = [row for row, item in enumerate(plan.scheduled) if item.is_last_chunk]
        sampled = self._sample(plan, rows, hidden, metadata)
        self._scheduler.commit(plan)
        return [
            self._append(plan.scheduled[row].sequence, token)
            for row, token in zip(rows, sampled, strict=True)
        ]

    @torch.inference_mode()
    def _sample(
        self, plan: StepPlan, rows: list[int], hidden: torch.Tensor, metadata: AttentionMetadata
    ) -> list[SampledToken]:
        if not rows:
            return []
        last = metadata.last_token_index[torch.tensor(rows, device=hidden.device)]
        logits = self._runner.model.logits(hidden[last])
        sequences = [plan.scheduled[row].sequence for row in rows]
        return self._sampler.sample(logits, sequences, [self._generation(s).sampling for s in sequences])

    def _generation(self, sequence: Sequence) -> _Generation:
        return self._active[sequence.request.uid].generations[sequence.index][1]

    @torch.inference_mode()
    def _collect_prompt_logprobs(self, plan: StepPlan, hidden: torch.Tensor) -> None:
        first_row = 0
        for item in plan.scheduled:
            collected = self._generation(item.sequence).prompt_logprobs
            if collected is not None:
                self._extend_prompt_logprobs(item, collected, hidden[first_row : first_row + item.num_tokens])
            first_row += item.num_tokens

    def _extend_prompt_logprobs(
        self, item: ScheduledSequence, collected: list[list[TokenLogprob]], hidden: torch.Tensor
    ) -> None:
        """The row of a position tells of the token after it.

        What is computed again after a preemption is there already.
        """
        sequence = item.sequence
        start = sequence.num_computed_tokens
        first = max(start, len(collected) - 1)
        last = min(start + item.num_tokens, sequence.num_prompt_tokens - 1)
        if first >= last:
            return
        logits = self._runner.model.logits(hidden[first - start : last - start])
        targets = torch.tensor(sequence.token_ids[first + 1 : last + 1], device=logits.device)
        count = sequence.request.sampling.prompt_logprobs or 0
        collected += token_logprobs(logits, targets, [count] * (last - first))

    def _append(self, sequence: Sequence, token: SampledToken) -> SequenceOutput:
        """Gives a sequence its new token, and ends it if that was the last one."""
        request = sequence.request
        active = self._active[request.uid]
        generation = active.generations[sequence.index][1]
        if token.error is not None:
            self._remove(active, sequence.index)
            return _failed(request.uid, sequence.index, token.error)
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
        """The state after a step that computed `step_tokens` tokens."""
        scheduler = self._scheduler
        return EngineStats(
            received=self._received,
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            free_slots=scheduler.free_slots,
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
