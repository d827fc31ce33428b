"""From logits to tokens: each request's own sampling parameters, over the whole batch at once.

A request's tokens do not depend on what it is batched with: its random numbers are a function of its seed and
the token's position alone, so they also survive preemption, and the move to another worker. Where the client
gives no seed it is a hash of the request's uid, which is random.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from fastserve.engine.compute_errors import not_finite
from fastserve.engine.guides import CompiledGuide, GuideMatcher
from fastserve.engine.logits_processor import LogitsProcessor
from fastserve.engine.logprobs import PromptLogprobs, token_logprobs
from fastserve.engine.random_numbers import sequence_seed, uid_seed, uniform_numbers
from fastserve.errors import RequestError
from fastserve.scheduling.sequence import Sequence
from fastserve.text.stop_conditions import stop_token_ids
from fastserve.types import TokenLogprob
from fastserve_kernels import ops


class SamplingState:
    """What is kept of one sequence for its sampling. A preempted sequence keeps its tokens, and so this."""

    def __init__(
        self, sequence: Sequence, seed: int, stop_token_ids: list[int], matcher: GuideMatcher | None
    ) -> None:
        """`stop_token_ids`: those that end the sequence (see `stop_conditions`)."""
        self.sequence = sequence
        self.params = params = sequence.request.sampling
        self.seed = seed
        self.stop_token_ids = stop_token_ids
        processor = LogitsProcessor(sequence, stop_token_ids, matcher)
        self.processor = processor if processor.is_needed else None
        """None: the logits are taken as they are, but for temperature and truncation."""
        self.prompt_logprobs: PromptLogprobs | None = None
        """Of sequence 0, if the request asks for them."""
        if params.prompt_logprobs is not None and sequence.index == 0:
            self.prompt_logprobs = PromptLogprobs(sequence, params.prompt_logprobs)

    def append(self, token_id: int) -> RequestError | None:
        """Takes a token that was sampled; returns what is wrong if the guide does not take it."""
        return None if self.processor is None else self.processor.append(token_id)

    @property
    def is_guide_complete(self) -> bool:
        """Whether the guide lets nothing follow but the end."""
        return self.processor is not None and self.processor.is_guide_complete


@dataclass(slots=True)
class SampledToken:
    """What sampling gave one sequence: a token, or why there is none."""

    token_id: int
    logprobs: list[TokenLogprob]
    error: RequestError | None = None
    following: list[torch.Tensor] = field(default_factory=list)
    """The logits [vocab] behind each token that was proposed to come now, then next and so on."""


class Sampler:
    """Chooses the next token of each sequence of a batch. It changes nothing but the logits it is given."""

    def __init__(self, eos_token_ids: list[int], vocab_size: int) -> None:
        """`vocab_size`: the model's. An end token beyond it, as a tokenizer may have, never comes."""
        self._eos_token_ids = [token_id for token_id in eos_token_ids if token_id < vocab_size]

    def start(self, sequence: Sequence, guide: CompiledGuide | None) -> SamplingState:
        """The state for a sequence that begins."""
        params = sequence.request.sampling
        seed = uid_seed(sequence.request.uid) if params.seed is None else params.seed
        return SamplingState(
            sequence,
            seed=sequence_seed(seed, sequence.index),
            stop_token_ids=stop_token_ids(params, self._eos_token_ids),
            matcher=guide.matcher() if guide else None,
        )

    def sample(self, logits: torch.Tensor, states: list[SamplingState]) -> list[SampledToken]:
        """One token for each sequence, or why there is none; `SamplingState.append` is to be told of it.

        logits: [len(states), vocab] fp32, on any device; changed in place. Log-probabilities are those of the
        model itself, before any of the request's parameters.
        """
        rows = [row for row, state in enumerate(states) if state.params.logprobs is not None]
        unprocessed = logits[rows].clone() if rows else None
        errors = [
            None if state.processor is None else state.processor.process(logits[row])
            for row, state in enumerate(states)
        ]
        token_ids, peaks = self._draw(logits, states)
        logprobs = {}
        if unprocessed is not None:
            counts = [states[row].params.logprobs or 0 for row in rows]
            logprobs = dict(zip(rows, token_logprobs(unprocessed, token_ids[rows], counts), strict=True))
        sampled = []
        for row, (token_id, peak) in enumerate(zip(token_ids.tolist(), peaks.tolist(), strict=True)):
            error = errors[row]
            if error is None and not math.isfinite(peak):
                error = _no_token(peak, states[row])
            sampled.append(SampledToken(token_id, logprobs.get(row, []), error))
        return sampled

    @staticmethod
    def _draw(logits: torch.Tensor, states: list[SamplingState]) -> tuple[torch.Tensor, torch.Tensor]:
        """A token of each row [n], and the row's largest logit [n]: finite unless the row is of no use."""
        params = [state.params for state in states]
        if all(p.temperature == 0.0 for p in params):
            greedy = argmax(logits)
            return greedy, logits.gather(1, greedy[:, None])[:, 0]
        positions = [state.sequence.num_generated_tokens for state in states]
        uniform = uniform_numbers([state.seed for state in states], positions)
        device = logits.device
        drawn = ops.sample(
            logits,
            torch.tensor([p.temperature for p in params], dtype=torch.float32, device=device),
            torch.tensor([max(p.top_k, 0) for p in params], dtype=torch.int64, device=device),
            torch.tensor([p.top_p for p in params], dtype=torch.float32, device=device),
            torch.tensor([p.min_p for p in params], dtype=torch.float32, device=device),
            torch.from_numpy(uniform).to(device),
        )
        return drawn, logits.amax(dim=-1)


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """The first of the largest of each row of logits [n, vocab]: [n] int64.

    numpy has vector instructions for it: on a CPU torch's own takes six times as long.
    """
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


def _no_token(peak: float, state: SamplingState) -> RequestError:
    """Why nothing can be drawn from a row whose largest logit is no finite number."""
    forbidden = state.processor.no_token_left() if state.processor and peak == -math.inf else None
    return forbidden or not_finite(state.sequence.num_tokens - 1)
