"""From logits to tokens: each request's own sampling parameters, over the whole batch at once.

A request's tokens do not depend on what it is batched with: its random numbers are a function of its seed and
the token's position alone (a counter-based generator, as in Salmon et al., "Parallel random numbers: as easy
as 1, 2, 3", SC 2011), so they also survive preemption.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import numpy as np
import torch

from fastserve.engine.guides import CompiledGuide, GuideMatcher
from fastserve.errors import RequestError
from fastserve.scheduling.sequence import Sequence
from fastserve.types import SamplingParams, TokenLogprob
from fastserve_kernels import ops


@dataclass(slots=True)
class SampledToken:
    """What sampling gave one sequence: a token, or why there is none."""

    token_id: int
    logprobs: list[TokenLogprob]
    error: RequestError | None = None


@dataclass(slots=True)
class SamplingState:
    """What one sequence's sampling remembers from token to token."""

    seed: int
    stop_token_ids: list[int]
    """Those that end the sequence: its own and, unless ignored, the model's."""
    matcher: GuideMatcher | None


class Sampler:
    """Chooses the next token of each sequence of a batch."""

    def __init__(self, eos_token_ids: list[int]) -> None:
        self._eos_token_ids = eos_token_ids

    def start(self, sequence: Sequence, guide: CompiledGuide | None) -> SamplingState:
        """The state for a sequence that begins."""
        params = sequence.request.sampling
        seed = secrets.randbits(64) if params.seed is None else params.seed
        return SamplingState(
            seed=(seed + sequence.index) % 2**64,
            stop_token_ids=params.stop_token_ids + ([] if params.ignore_eos else self._eos_token_ids),
            matcher=guide.matcher() if guide else None,
        )

    def sample(
        self, logits: torch.Tensor, sequences: list[Sequence], states: list[SamplingState]
    ) -> list[SampledToken]:
        """One token for each sequence.

        logits: [len(sequences), vocab] fp32, on any device; changed in place. Log-probabilities are those
        of the model itself, before any of the request's parameters.
        """
        reported = _Logprobs(logits, [sequence.request.sampling.logprobs for sequence in sequences])
        errors = [_adjust(logits[row], sequences[row], states[row]) for row in range(len(sequences))]
        params = [sequence.request.sampling for sequence in sequences]
        token_ids = self._draw(logits, params, sequences, states)
        logprobs = reported.of(token_ids)
        chosen = token_ids.tolist()
        for row, state in enumerate(states):
            if state.matcher is not None and errors[row] is None:
                errors[row] = state.matcher.accept(chosen[row])
        return [SampledToken(chosen[row], logprobs[row], errors[row]) for row in range(len(sequences))]

    @staticmethod
    def _draw(
        logits: torch.Tensor,
        params: list[SamplingParams],
        sequences: list[Sequence],
        states: list[SamplingState],
    ) -> torch.Tensor:
        if all(p.temperature == 0.0 for p in params):
            return logits.argmax(dim=-1)
        uniform = uniform_numbers(
            [state.seed for state in states], [sequence.num_generated_tokens for sequence in sequences]
        )
        device = logits.device
        return ops.sample(
            logits,
            torch.tensor([p.temperature for p in params], dtype=torch.float32, device=device),
            torch.tensor([max(p.top_k, 0) for p in params], dtype=torch.int64, device=device),
            torch.tensor([p.top_p for p in params], dtype=torch.float32, device=device),
            torch.tensor([p.min_p for p in params], dtype=torch.float32, device=device),
            torch.from_numpy(uniform).to(device),
        )


class _Logprobs:
    """The log-probabilities that some rows of a batch ask for, taken before the logits are adjusted."""

    def __init__(self, logits: torch.Tensor, counts: list[int | None]) -> None:
        self._counts = counts
        self._rows = [row for row, count in enumerate(counts) if count is not None]
        self._logits = logits[self._rows].clone() if self._rows else None

    def of(self, token_ids: torch.Tensor) -> list[list[TokenLogprob]]:
        """For each row of the batch, the chosen token's and then the likeliest ones'; empty where unasked."""
        result: list[list[TokenLogprob]] = [[] for _ in self._counts]
        if self._logits is not None:
            counts = [self._counts[row] or 0 for row in self._rows]
            for row, entry in zip(
                self._rows, token_logprobs(self._logits, token_ids[self._rows], counts), strict=True
            ):
                result[row] = entry
        return result


def token_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, counts: list[int]
) -> list[list[TokenLogprob]]:
    """Per row of logits [n, vocab]: (id, logprob, rank) of token_ids[row], then of the likeliest."""
    chosen, ranks, top_ids, top = ops.log_probs(logits, token_ids, max(counts))
    rows = zip(
        token_ids.tolist(), chosen.tolist(), ranks.tolist(), top_ids.tolist(), top.tolist(), strict=True
    )
    return [
        [(token, logprob, rank)]
        + [
            (other, value, place + 1)
            for place, (other, value) in enumerate(zip(ids[:count], values, strict=False))
        ]
        for count, (token, logprob, rank, ids, values) in zip(counts, rows, strict=True)
    ]


def uniform_numbers(seeds: list[int], positions: list[int]) -> np.ndarray:
    """Uniform numbers [n] float64 in [0, 1), each a hash of its seed and position alone.

    Two rounds of the SplitMix64 finaliser (Steele, Lea, Flood, OOPSLA 2014), 53 bits of the result.
    """
    with np.errstate(over="ignore"):
        mixed = _splitmix(np.array(seeds, dtype=np.uint64))
        mixed = _splitmix(mixed ^ _splitmix(np.array(positions, dtype=np.uint64)))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _adjust(logits: torch.Tensor, sequence: Sequence, state: SamplingState) -> RequestError | None:
    """Applies to one row [vocab] what its request asks for beyond temperature and truncation."""
    params = sequence.request.sampling
    if state.matcher is not None:
        error = state.matcher.mask(logits)
        if error is not None:
            return error
    if sequence.num_generated_tokens < params.min_tokens:
        logits[state.stop_token_ids] = -torch.inf
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(
            list(params.logit_bias.values()), dtype=logits.dtype, device=logits.device
        )
    banned = banned_tokens(sequence)
    if banned:
        logits[banned] = -torch.inf
    _penalise(logits, sequence, params)
    return None


def banned_tokens(sequence: Sequence) -> list[int]:
    """Tokens that would complete one of the request's bad words."""
    generated = sequence.token_ids[sequence.num_prompt_tokens :]
    return [
        word[-1]
        for word in sequence.request.bad_words_token_ids
        if len(word) - 1 <= len(generated) and word[:-1] == generated[len(generated) - len(word) + 1 :]
    ]


def _penalise(logits: torch.Tensor, sequence: Sequence, params: SamplingParams) -> None:
    """Repetition penalty (Keskar et al., arXiv 1909.05858) over prompt and answer, others over the answer."""
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(np.unique(sequence.token_ids), device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(
            values > 0, values / params.repetition_penalty, values * params.repetition_penalty
        )
    if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        generated = np.asarray(sequence.token_ids[sequence.num_prompt_tokens :], dtype=np.int64)
        ids, counts = np.unique(generated, return_counts=True)
        penalty = params.presence_penalty + params.frequency_penalty * counts
        logits[torch.from_numpy(ids).to(logits.device)] -= torch.from_numpy(penalty).to(logits)
