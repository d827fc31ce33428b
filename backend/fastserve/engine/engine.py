"""The engine: schedule a step, compute it, sample, say what came of it.

add / cancel -> [plan -> run -> sample -> mark computed -> append] -> StepOutput     (`step`, again and again)

Behind a common queue the engine keeps no line of its own: what a plan leaves waiting is told with the step's
output, and comes back by `resume`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from msgspec.structs import replace

from fastserve.engine.compute_errors import not_computed
from fastserve.engine.guide_queue import GuideQueue
from fastserve.engine.guides import CompiledGuide, GuideCompiler
from fastserve.engine.isolation import compute_isolated
from fastserve.engine.micro_batches import ComputedBatch, MicroBatches
from fastserve.engine.model_runner import ModelRunner
from fastserve.engine.sampler import SampledToken, Sampler, SamplingState
from fastserve.engine.speculator import Speculator
from fastserve.engine.step_computation import StepComputation
from fastserve.errors import ErrorCode, RequestError, invalid, prompt_too_long
from fastserve.scheduling.batch_report import report_batch
from fastserve.scheduling.block_tables import CacheTooSmallError
from fastserve.scheduling.iteration_scheduler import IterationScheduler
from fastserve.scheduling.sequence import ScheduledSequence, Sequence, StepPlan
from fastserve.text.stop_conditions import check_stop, external_stop, has_expired
from fastserve.text.validation import Vocabulary
from fastserve.types import (
    Add,
    EngineStats,
    Failure,
    Outcome,
    Request,
    RequestView,
    SequenceOutput,
    StepOutput,
    view_of,
)

logger = logging.getLogger(__name__)

MAX_RANKS = 16
"""Ranks of running sequences that the common queue is told: so many can be preempted between two messages."""


@dataclass(slots=True)
class _RequestState:
    request: Request
    sequences: dict[int, SamplingState] = field(default_factory=dict)
    """Of its sequences that have not ended, by index."""


class Engine:
    """Continuous batching of requests over one model. Not thread-safe: one thread owns it."""

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: IterationScheduler,
        sampler: Sampler,
        guides: GuideCompiler,
        speculator: Speculator,
        max_model_len: int,
        has_common_queue: bool = False,
        takes_all_cores: bool = False,
    ) -> None:
        """`max_model_len`: tokens of prompt and answer that the model and its KV cache can hold.

        `has_common_queue`: whether sequences that wait are told and resumed; else they wait in `scheduler`.
        `takes_all_cores`: whether the model's kernels run on all cores that this process may use.
        """
        self.max_model_len = max_model_len
        self.runner = runner
        self.scheduler = scheduler
        self._sampler = sampler
        self._speculator = speculator
        self._computation = StepComputation(runner, sampler, self._state_of)
        self._micro_batches = MicroBatches(runner, self._computation, scheduler)
        self._guide_queue = GuideQueue(guides)
        """Requests whose guide is being compiled."""
        self._vocabulary = Vocabulary(runner.model.vocab_size, runner.model.vocab_size)
        self._active: dict[str, _RequestState] = {}
        """Requests that the scheduler has, by uid."""
        self._has_common_queue = has_common_queue
        self._takes_all_cores = takes_all_cores
        self._has_first_token = False
        """Whether the last step brought a sequence's first token."""
        self._preempted: dict[tuple[str, int], Sequence] = {}
        """Sequences that wait in the common queue, by uid and index."""
        self._ended: list[tuple[str, int]] = []
        """Those that ended there; told with the next step."""
        self._received = 0
        self._outputs: list[SequenceOutput] = []
        """Outputs that leave with the next step."""
        self._is_unchecked = False
        """Whether the scheduler's books have changed since they were checked."""

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do; when the last request has ended, that is to check the books."""
        is_to_check = self._is_unchecked and not self._active
        return bool(
            self.scheduler.has_sequences
            or self._micro_batches
            or self._guide_queue
            or self._outputs
            or is_to_check
        )

    @property
    def num_preempted(self) -> int:
        """Sequences that wait in the common queue."""
        return len(self._preempted)

    @property
    def gives_way(self) -> bool:
        """Whether those who pass tokens on need a core before the next step takes all of them again."""
        return self._takes_all_cores and self._has_first_token

    @property
    def block_size(self) -> int:
        """Tokens in a KV block."""
        return self.scheduler.pool.block_size

    def on_loss(self, tell: Callable[[Exception], None]) -> None:
        """Has `tell` called, from another thread, when a rank that computes with this one has ended."""
        self.runner.on_loss = tell

    def add(self, message: Add) -> None:
        """Takes a request in. One that cannot be served ends with a failure at the next step.

        So does, with the request that is being served, a second one of its uid: outputs name nothing else.
        """
        request = message.request
        self._received += 1
        if request.uid in self._active or request.uid in self._guide_queue:
            sentence = f"another request of the uid {request.uid} came while this one was served"
            self._fail(request.uid, RequestError(sentence, ErrorCode.INTERNAL))
            return
        try:
            self._check(request)
        except RequestError as error:
            self._refuse(request, error)
            return
        if request.sampling.guide is None:
            self._start(message, None)
        else:
            self._guide_queue.add(message, request.sampling.guide)

    def _check(self, request: Request) -> None:
        """Raises RequestError, naming the field, for a request that the model cannot serve.

        `InputProcessor` has looked before. This is the last line of defense: one id beyond the embedding
        would end the worker, and every request of the batch with it.
        """
        length = len(request.prompt_token_ids)
        if length == 0:
            raise invalid("prompt", "no tokens", "at least one")
        if length >= self.max_model_len:
            raise prompt_too_long(length, self.max_model_len)
        self._vocabulary.check_request(request)

    def _start(self, message: Add, guide: CompiledGuide | None) -> None:
        request = message.request
        self._is_unchecked = True
        state = self._active[request.uid] = _RequestState(request)
        for index in range(request.sampling.n):
            view = replace(message.view, index=index) if message.view else view_of(request, index)
            sequence = Sequence(request, index, view, [*request.prompt_token_ids, *message.generated])
            state.sequences[index] = sampling = self._sampler.start(sequence, guide)
            for token_id in message.generated:
                if (error := sampling.append(token_id)) is not None:
                    self._fail(request.uid, error)
                    return
            self.scheduler.add(sequence, time.monotonic())

    def resume(self, uid: str, index: int) -> None:
        """Lets a sequence that waits in the common queue run again; nothing happens if it has ended."""
        self._received += 1
        if (sequence := self._preempted.pop((uid, index), None)) is not None:
            self.scheduler.add(sequence, time.monotonic())

    def forget(self, uid: str) -> None:
        """Lets go of a preempted request with one sequence, silently: another worker goes on with it."""
        if (sequence := self._preempted.pop((uid, 0), None)) is not None:
            self.scheduler.forget(uid, 0)
            self._speculator.forget(sequence)
            del self._active[uid]

    def _refuse(self, request: Request, error: RequestError) -> None:
        """Ends a request that was never started."""
        self._end(request.uid, range(request.sampling.n), Outcome.ERROR, Failure.of(error))

    def _fail(self, uid: str, error: RequestError) -> None:
        """Ends a whole request: its client gets an error in place of what is left to come."""
        self._abort(uid, Outcome.ERROR, Failure.of(error))

    def cancel(self, uid: str, outcome: Outcome, index: int | None = None) -> None:
        """Stops a request, or one sequence of it; nothing happens if it is not being served."""
        self._abort(uid, outcome, external_stop(outcome), index)

    def _abort(self, uid: str, outcome: Outcome, failure: Failure | None, index: int | None = None) -> None:
        """Ends a request, or one sequence of it, wherever it is."""
        if uid in self._guide_queue:
            self._end(uid, range(self._guide_queue.pop(uid).request.sampling.n), outcome, failure)
        if (state := self._active.get(uid)) is not None:
            indices = [each for each in state.sequences if index in (None, each)]
            for each in indices:
                self._remove(state, each)
            self._end(uid, indices, outcome, failure)

    def _end(self, uid: str, indices: Iterable[int], outcome: Outcome, failure: Failure | None) -> None:
        self._outputs += [SequenceOutput(uid, each, outcome=outcome, failure=failure) for each in indices]

    def _remove(self, state: _RequestState, index: int) -> None:
        self._speculator.forget(state.sequences.pop(index).sequence)
        key = (state.request.uid, index)
        if self._preempted.pop(key, None) is not None:
            self.scheduler.forget(*key)
            self._ended.append(key)
        else:
            self.scheduler.remove(*key, now=time.monotonic())
        if not state.sequences:
            del self._active[state.request.uid]

    def step(self) -> StepOutput:
        """One iteration: computes what the scheduler plans, and returns what it brought to every request.

        With several micro-batches it begins what is planned, and returns what the oldest one brought, if as
        many as there may be are being computed or nothing else can be planned.

        Raises what the model raised if the device no longer computes anything, and BlockPoolError or
        SchedulerError if blocks or sequences are left over when the last request has ended.
        """
        self._has_first_token = False
        self._expire(time.monotonic())
        self._start_compiled()
        self._check_when_idle()
        plan = self._speculator.extend(self._plan(), self.scheduler.reserve)
        preempted = self._hand_back() if self._has_common_queue else []
        self.runner.copy_blocks(plan)
        if plan.scheduled:
            self._micro_batches.start(plan)
        batch = self._micro_batches.take(has_more=bool(plan.scheduled))
        if batch is not None and batch.plan.scheduled:
            self._finish(batch)
        outputs, self._outputs = self._outputs, []
        ended, self._ended = self._ended, []
        num_tokens = 0 if batch is None else batch.plan.num_tokens
        return StepOutput(outputs, self.stats(num_tokens), preempted, ended)

    def _finish(self, batch: ComputedBatch) -> None:
        """Draws and takes the tokens of what is computed."""
        items = batch.plan.scheduled
        tokens = compute_isolated(items, batch.compute, self.runner.probe)
        self.scheduler.observe(batch.plan, time.perf_counter() - batch.started)
        self._take_tokens(items, tokens)
        self._speculator.verify(items, tokens, self._is_active, self._draw_next)
        if not batch.has_prompts:
            self._speculator.observe_step(batch.plan, time.perf_counter() - batch.alone_since)
        self._micro_batches.finish()

    def _hand_back(self) -> list[RequestView]:
        """Takes what the plan left waiting out of the scheduler: it waits in the common queue."""
        waiting = self.scheduler.take_waiting()
        self._preempted |= {(each.request.uid, each.index): each for each in waiting}
        return [sequence.view for sequence in waiting]

    def _expire(self, now: float) -> None:
        requests = [state.request for state in self._active.values()]
        requests += [message.request for message in self._guide_queue]
        for request in requests:
            if has_expired(request, now):
                self.cancel(request.uid, Outcome.TIMEOUT)

    def _start_compiled(self) -> None:
        """Starts requests whose guide is compiled; waits a little for one if there is nothing else to do."""
        for message, guide in self._guide_queue.pop_compiled(has_time=not self.scheduler.has_sequences):
            if isinstance(guide, RequestError):
                self._refuse(message.request, guide)
            else:
                self._start(message, guide)

    def _check_when_idle(self) -> None:
        """Checks the books when nothing is held, and nobody waits for the time that it takes."""
        if self._is_unchecked and not self._active:
            self.scheduler.check()
            self._is_unchecked = False

    def _plan(self) -> StepPlan:
        while True:
            try:
                return self.scheduler.plan(time.monotonic())
            except CacheTooSmallError as error:
                self._fail(error.sequence.request.uid, RequestError(str(error)))

    def _draw_next(self, logits: dict[Sequence, torch.Tensor]) -> list[SampledToken | None]:
        """Draws and takes one token more of each sequence from its logits [vocab]: a step of decodes."""
        decodes = [ScheduledSequence(sequence, 1) for sequence in logits]
        tokens = compute_isolated(decodes, partial(self._computation.sample, logits), self.runner.probe)
        self._take_tokens(decodes, tokens)
        return tokens

    def _is_active(self, sequence: Sequence) -> bool:
        """Whether the sequence has not ended."""
        state = self._active.get(sequence.request.uid)
        return state is not None and sequence.index in state.sequences

    def _state_of(self, sequence: Sequence) -> SamplingState:
        return self._active[sequence.request.uid].sequences[sequence.index]

    def _take_tokens(self, items: list[ScheduledSequence], tokens: list[SampledToken | None]) -> None:
        """Marks the items as computed, fails requests with an error, and gives the others their tokens."""
        computed = list(zip(items, tokens, strict=True))
        kept = [item for item, token in computed if token is None or token.error is None]
        self.scheduler.mark_computed(StepPlan(kept, []), time.monotonic())
        for item, token in computed:
            if token is not None and token.error is not None:
                self._fail(item.sequence.request.uid, token.error)
        for item, token in computed:
            if token is not None and item.sequence.request.uid in self._active:
                self._advance(item.sequence, token)

    def _advance(self, sequence: Sequence, token: SampledToken) -> None:
        """Gives a sequence its new token; its request fails, and no other, if it cannot be taken."""
        try:
            error = self._append(sequence, token)
        except Exception as failure:
            logger.exception("request %s fails, and the others go on", sequence.request.uid)
            error = not_computed(failure)
        if error is not None:
            self._fail(sequence.request.uid, error)

    def _append(self, sequence: Sequence, token: SampledToken) -> RequestError | None:
        """Appends the token, and ends the sequence if that was the last; returns an error of its guide."""
        uid, index = sequence.request.uid, sequence.index
        state = self._state_of(sequence)
        if (error := state.append(token.token_id)) is not None:
            return error
        is_first = sequence.num_generated_tokens == 0
        self._has_first_token |= is_first
        sequence.token_ids.append(token.token_id)
        outcome = check_stop(sequence, state.stop_token_ids, state.is_guide_complete, self.max_model_len)
        if outcome is not None:
            self._remove(self._active[uid], index)
        self._outputs.append(
            SequenceOutput(
                uid,
                index,
                token_ids=[token.token_id],
                logprobs=[token.logprobs] if token.logprobs else [],
                prompt_logprobs=state.prompt_logprobs.entries if is_first and state.prompt_logprobs else None,
                num_cached_tokens=sequence.num_cached_tokens if is_first else 0,
                outcome=outcome,
                preemptions=sequence.view.preemptions
                if outcome and sequence.view.preemptions.count
                else None,
            )
        )
        return None

    def stats(self, step_tokens: int = 0) -> EngineStats:
        """The state after a step that computed `step_tokens` tokens.

        Requests whose guide is being compiled have their slots already.
        """
        scheduler = self.scheduler
        report = report_batch(scheduler, MAX_RANKS)
        waiting_for_guide = sum(message.request.sampling.n for message in self._guide_queue)
        return EngineStats(
            received=self._received,
            running=scheduler.num_running,
            waiting=scheduler.num_waiting + len(self._preempted),
            **report._replace(free_slots=report.free_slots - waiting_for_guide)._asdict(),
            kv_blocks_total=scheduler.pool.num_blocks,
            kv_blocks_used=scheduler.pool.num_used,
            step_tokens=step_tokens,
            preemptions_total=scheduler.num_preemptions,
            resumptions_total={kind.value: count for kind, count in scheduler.num_resumed.items()},
            swapped_blocks_total=scheduler.num_swapped_blocks,
            recomputed_tokens_total=scheduler.num_recomputed_tokens,
            prefix_cache_hit_tokens_total=scheduler.num_prefix_cache_hit_tokens,
            draft_tokens_total=self._speculator.num_draft_tokens,
            accepted_tokens_total=self._speculator.num_accepted_tokens,
        )
