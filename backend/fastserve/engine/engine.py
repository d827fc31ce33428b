"""The engine: schedule a step, compute it, sample, say what came of it.

add / cancel -> [plan -> run -> sample -> mark computed -> append] -> StepOutput     (`step`, again and again)

Until its tokens are marked as computed a step changes nothing but what it would write again: keys and values
of its own tokens. So one that raises is computed again by halves, and only the sequence that it cannot be
computed with fails.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field

import torch

from fastserve.engine.guides import CompiledGuide, GuideCompiler
from fastserve.engine.model_runner import ModelRunner
from fastserve.engine.sampler import SampledToken, Sampler, SamplingState, not_finite, token_logprobs
from fastserve.errors import ErrorCode, RequestError, invalid, prompt_too_long
from fastserve.models.kv_cache import KVCaches
from fastserve.scheduling.iteration_scheduler import CacheTooSmallError, IterationScheduler
from fastserve.scheduling.policies import Policy
from fastserve.scheduling.sequence import ScheduledSequence, Sequence, StepPlan
from fastserve.text.stop_conditions import check_stop, external_stop, has_expired
from fastserve.text.validation import Vocabulary
from fastserve.types import EngineStats, Failure, Outcome, Request, SequenceOutput, StepOutput, TokenLogprob

logger = logging.getLogger(__name__)

GUIDE_WAIT_SECONDS = 0.01
MAX_CAUSE = 300
"""Characters of an exception's text that a client is shown."""


@dataclass(slots=True)
class _SequenceState:
    """What the engine keeps of a sequence that has not ended."""

    sequence: Sequence
    sampling: SamplingState
    prompt_logprobs: list[list[TokenLogprob]] | None
    """Log-probabilities of the prompt tokens computed so far, if the request asks for them."""


@dataclass(slots=True)
class _RequestState:
    request: Request
    sequences: dict[int, _SequenceState] = field(default_factory=dict)
    """The sequences that have not ended, by index."""


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
        """`max_model_len`: tokens of prompt and answer that the model and its KV cache can hold."""
        self.max_model_len = max_model_len
        self._runner = runner
        self._scheduler = scheduler
        self._policy = policy
        self._sampler = sampler
        self._guides = guides
        self._vocabulary = Vocabulary(runner.model.vocab_size, runner.model.vocab_size)
        self._waiting_for_guide: dict[str, tuple[Request, Future[CompiledGuide]]] = {}
        """Requests whose guide is being compiled, by uid."""
        self._active: dict[str, _RequestState] = {}
        """Requests that the scheduler has, by uid."""
        self._received = 0
        self._outputs: list[SequenceOutput] = []
        """Outputs that leave with the next step."""
        self._is_unchecked = False
        """Whether the scheduler's books have changed since they were checked."""

    @property
    def kv_caches(self) -> KVCaches:
        """The KV cache's tensors, by layer."""
        return self._runner.kv_caches

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do; when the last request has ended, that is to check the books."""
        return bool(self._active or self._waiting_for_guide or self._outputs or self._is_unchecked)

    def add(self, request: Request) -> None:
        """Takes a request in. One that cannot be served ends with a failure at the next step.

        So does, with the request that is being served, a second one of its uid: outputs name nothing else.
        """
        self._received += 1
        if request.uid in self._active or request.uid in self._waiting_for_guide:
            sentence = f"another request of the uid {request.uid} came while this one was served"
            self._abort(request.uid, Outcome.ERROR, _failure(RequestError(sentence, ErrorCode.INTERNAL)))
            return
        try:
            self._check(request)
        except RequestError as error:
            self._fail(request, error)
            return
        if request.sampling.guide is None:
            self._start(request, None)
        else:
            self._waiting_for_guide[request.uid] = (request, self._guides.compile(request.sampling.guide))

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
        self._vocabulary.check("prompt", request.prompt_token_ids)
        self._vocabulary.check("logit_bias", request.sampling.logit_bias)
        self._vocabulary.check("stop_token_ids", request.sampling.stop_token_ids)
        for word in request.bad_words_token_ids:
            self._vocabulary.check("bad_words", word)

    def _start(self, request: Request, guide: CompiledGuide | None) -> None:
        state = self._active[request.uid] = _RequestState(request)
        key = self._policy.key(request.priority, request.arrival)
        for index in range(request.sampling.n):
            sequence = Sequence(request, index, key, token_ids=list(request.prompt_token_ids))
            wants_prompt = request.sampling.prompt_logprobs is not None and index == 0
            sampling = self._sampler.start(sequence, guide)
            state.sequences[index] = _SequenceState(sequence, sampling, [[]] if wants_prompt else None)
            self._scheduler.add(sequence)

    def _fail(self, request: Request, error: RequestError) -> None:
        """Ends a request that was never started."""
        self._end(request.uid, range(request.sampling.n), Outcome.ERROR, _failure(error))

    def cancel(self, uid: str, outcome: Outcome, index: int | None = None) -> None:
        """Stops a request, or one sequence of it; nothing happens if it is not being served."""
        self._abort(uid, outcome, external_stop(outcome), index)

    def _abort(self, uid: str, outcome: Outcome, failure: Failure | None, index: int | None = None) -> None:
        """Ends a request, or one sequence of it, wherever it is."""
        if uid in self._waiting_for_guide:
            request, _ = self._waiting_for_guide.pop(uid)
            self._end(uid, range(request.sampling.n), outcome, failure)
        if (state := self._active.get(uid)) is not None:
            indices = [each for each in state.sequences if index in (None, each)]
            for each in indices:
                self._remove(state, each)
            self._end(uid, indices, outcome, failure)

    def _end(self, uid: str, indices: Iterable[int], outcome: Outcome, failure: Failure | None) -> None:
        self._outputs += [SequenceOutput(uid, each, outcome=outcome, failure=failure) for each in indices]

    def _remove(self, state: _RequestState, index: int) -> None:
        del state.sequences[index]
        self._scheduler.remove(state.request.uid, index)
        if not state.sequences:
            del self._active[state.request.uid]

    def step(self) -> StepOutput:
        """One iteration: computes what the scheduler plans, and returns what it brought to every request.

        Raises what the model raised if the device no longer computes anything, and BlockPoolError or
        SchedulerError if blocks or sequences are left over when the last request has ended.
        """
        self._expire(time.monotonic())
        self._start_compiled()
        self._check_when_idle()
        plan = self._plan()
        if plan.scheduled:
            self._compute(plan)
        outputs, self._outputs = self._outputs, []
        return StepOutput(outputs, self.stats(plan.num_tokens))

    def _check_when_idle(self) -> None:
        """Checks the books when nothing is held, and nobody waits for the time that it takes."""
        if self._is_unchecked and not self._active:
            self._scheduler.check()
            self._is_unchecked = False

    def _plan(self) -> StepPlan:
        while True:
            try:
                return self._scheduler.plan()
            except CacheTooSmallError as error:
                self._fail_active(error.sequence, RequestError(str(error)))

    def _expire(self, now: float) -> None:
        requests = [state.request for state in self._active.values()]
        requests += [request for request, _ in self._waiting_for_guide.values()]
        for request in requests:
            if has_expired(request, now):
                self.cancel(request.uid, Outcome.TIMEOUT)

    def _start_compiled(self) -> None:
        """Starts requests whose guide is compiled; waits a little for one if there is nothing else to do."""
        if not self._waiting_for_guide:
            return
        futures = [future for _, future in self._waiting_for_guide.values()]
        wait(futures, 0 if self._active else GUIDE_WAIT_SECONDS, FIRST_COMPLETED)
        self._guides.abandon_heavy()
        for uid, (request, future) in list(self._waiting_for_guide.items()):
            if future.done():
                del self._waiting_for_guide[uid]
                try:
                    self._start(request, future.result())
                except RequestError as error:
                    self._fail(request, error)

    def _compute(self, plan: StepPlan) -> None:
        self._is_unchecked = True
        computed = self._forward_isolated(plan.scheduled)
        failed = {item.sequence: token.error for item, token in computed if token and token.error}
        kept = [item for item, _ in computed if item.sequence not in failed]
        self._scheduler.mark_computed(StepPlan(kept, []))
        for sequence, error in failed.items():
            self._fail_active(sequence, error)
        for item, token in computed:
            if token is not None and item.sequence.request.uid in self._active:
                self._advance(item.sequence, token)

    def _forward_isolated(
        self, items: list[ScheduledSequence]
    ) -> list[tuple[ScheduledSequence, SampledToken | None]]:
        """Computes the items as `_forward` does, but one with which that raises gets an error in its place.

        Raises what `_forward` raised if the device does not compute what is known to work either.
        """
        try:
            return list(zip(items, self._forward(items), strict=True))
        except Exception as error:
            self._require_device(error)
            if len(items) > 1:
                middle = len(items) // 2
                return self._forward_isolated(items[:middle]) + self._forward_isolated(items[middle:])
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
        states = [self._state(item.sequence) for item in items]
        finite = hidden.sum(-1, dtype=torch.float32).isfinite().tolist()  # of finite numbers the sum is, too
        end = 0
        for number, item in enumerate(items):
            start, end = end, end + item.num_tokens
            error = None
            if False in finite[start:end]:
                error = not_finite(item.sequence.num_computed_tokens + finite[start:end].index(False))
            elif (collected := states[number].prompt_logprobs) is not None:
                error = self._extend_prompt_logprobs(item, collected, hidden[start:end])
            if error is not None:
                sampled[number] = SampledToken(-1, [], error)
        numbers = [i for i, item in enumerate(items) if item.is_last_chunk and sampled[i] is None]
        if numbers:
            last = metadata.last_token_index[torch.tensor(numbers, device=hidden.device)]
            logits = self._runner.model.logits(hidden[last])
            tokens = self._sampler.sample(logits, [states[number].sampling for number in numbers])
            for number, token in zip(numbers, tokens, strict=True):
                sampled[number] = token
        return sampled

    def _state(self, sequence: Sequence) -> _SequenceState:
        return self._active[sequence.request.uid].sequences[sequence.index]

    def _extend_prompt_logprobs(
        self, item: ScheduledSequence, collected: list[list[TokenLogprob]], hidden: torch.Tensor
    ) -> RequestError | None:
        """Adds the log-probabilities of the chunk `hidden` [item.num_tokens, hidden size].

        The row of a position tells of the token after it. What is computed again, after a preemption or in a
        step that raised, has been collected already. Returns an error if the numbers are not finite.
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
        for position, entries in enumerate(found, start=first):
            if math.isnan(entries[0][1]):
                return not_finite(position)
        collected += found
        return None

    def _advance(self, sequence: Sequence, token: SampledToken) -> None:
        """Gives a sequence its new token, and ends it if that was the last one, or if it cannot be taken."""
        try:
            state = self._state(sequence)
            error = state.sampling.append(token.token_id)
            if error is None:
                self._append(state, token)
                return
        except Exception as failure:
            logger.exception("request %s fails, and the others go on", sequence.request.uid)
            error = _not_computed(failure)
        self._fail_active(sequence, error)

    def _fail_active(self, sequence: Sequence, error: RequestError) -> None:
        """Ends the whole request of a sequence: its client gets an error in place of what is left to come."""
        self._abort(sequence.request.uid, Outcome.ERROR, _failure(error))

    def _append(self, state: _SequenceState, token: SampledToken) -> None:
        sequence, sampling = state.sequence, state.sampling
        uid = sequence.request.uid
        is_first = sequence.num_generated_tokens == 0
        sequence.token_ids.append(token.token_id)
        outcome = check_stop(
            sequence, sampling.stop_token_ids, sampling.is_guide_complete, self.max_model_len
        )
        if outcome is not None:
            self._remove(self._active[uid], sequence.index)
        self._outputs.append(
            SequenceOutput(
                uid,
                sequence.index,
                token_ids=[token.token_id],
                logprobs=[token.logprobs] if token.logprobs else [],
                prompt_logprobs=state.prompt_logprobs if is_first else None,
                num_cached_tokens=sequence.num_cached_tokens if is_first else 0,
                outcome=outcome,
            )
        )

    def stats(self, step_tokens: int = 0) -> EngineStats:
        """The state after a step that computed `step_tokens` tokens.

        Requests whose guide is being compiled have their slots already.
        """
        scheduler = self._scheduler
        waiting_for_guide = sum(request.sampling.n for request, _ in self._waiting_for_guide.values())
        return EngineStats(
            received=self._received,
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            free_slots=scheduler.free_slots - waiting_for_guide,
            lowest_key=scheduler.lowest_key,
            kv_blocks_total=scheduler.pool.num_blocks,
            kv_blocks_used=scheduler.pool.num_used,
            step_tokens=step_tokens,
            preemptions_total=scheduler.num_preemptions,
            prefix_cache_hit_tokens_total=scheduler.num_prefix_cache_hit_tokens,
        )


def _failure(error: RequestError) -> Failure:
    return Failure(code=error.code.value, message=str(error))


def _not_computed(error: Exception) -> RequestError:
    """An error of a code with which the client does not send the request again: it would only fail again."""
    cause = f"{type(error).__name__}: {error}"[:MAX_CAUSE]
    return RequestError(f"the model cannot compute this request: {cause}", ErrorCode.INTERNAL)
