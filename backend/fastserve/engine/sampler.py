"""From logits to tokens: each request's own sampling parameters, over the whole batch at once.

A request's tokens do not depend on what it is batched with: its random numbers are a function of its seed and
the token's position alone (a counter-based generator, as in Salmon et al., "Parallel random numbers: as easy
as 1, 2, 3", SC 2011), so they also survive preemption.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from fastserve.engine.guides import CompiledGuide, GuideMatcher
from fastserve.errors import ErrorCode, RequestError
from fastserve.scheduling.sequence import Sequence
from fastserve.text.stop_conditions import stop_token_ids
from fastserve.types import SamplingParams, TokenLogprob
from fastserve_kernels import ops


class TokenCounts:
    """The distinct tokens of a sequence, and how often each of them was generated."""

    def __init__(self, prompt_token_ids: list[int]) -> None:
        self._ids = np.unique(np.asarray(prompt_token_ids, dtype=np.int64))
        self._counts = np.zeros(len(self._ids), dtype=np.int64)
        self._index_of = {token_id: index for index, token_id in enumerate(self._ids.tolist())}
        """By token, its index in both arrays, which may be longer than this."""

    @property
    def ids(self) -> np.ndarray:
        """Distinct tokens of prompt and answer [n] int64."""
        return self._ids[: len(self._index_of)]

    @property
    def counts(self) -> np.ndarray:
        """How often each of `ids` was generated [n] int64; 0 for those that only the prompt has."""
        return self._counts[: len(self._index_of)]

    def add(self, token_id: int) -> None:
        """Counts a generated token."""
        index = self._index_of.setdefault(token_id, len(self._index_of))
        if index == len(self._ids):
            self._ids = _lengthened(self._ids)
            self._counts = _lengthened(self._counts)
        self._ids[index] = token_id
        self._counts[index] += 1


def _lengthened(array: np.ndarray) -> np.ndarray:
    return np.concatenate([array, np.zeros(max(64, len(array)), dtype=array.dtype)])


class BadWords:
    """A request's bad words, found by the token before their last: few words are looked at per token."""

    def __init__(self, words: Iterable[list[int]]) -> None:
        self._after: dict[int | None, list[list[int]]] = {}
        """By the last token but one; None: words of one token, which may never come."""
        for word in words:
            self._after.setdefault(word[-2] if len(word) > 1 else None, []).append(word)

    def banned(self, sequence: Sequence) -> list[int]:
        """Tokens that would complete one of the words; only what was generated counts."""
        if not self._after:
            return []
        return list(self._completions(sequence.token_ids, sequence.num_generated_tokens))

    def _completions(self, token_ids: list[int], num_generated: int) -> Iterator[int]:
        for word in self._after.get(None, ()):
            yield word[0]
        if num_generated == 0:
            return
        for word in self._after.get(token_ids[-1], ()):
            begun = len(word) - 1
            if begun <= num_generated and token_ids[-begun:] == word[:-1]:
                yield word[-1]


class SamplingState:
    """What the sampling of one sequence remembers: its seed, stop tokens, guide, and counts.

    Each new token is counted once, in time that does not grow with the sequence. A preempted sequence keeps
    its tokens, and so its state.
    """

    def __init__(
        self, sequence: Sequence, seed: int, stop_token_ids: list[int], matcher: GuideMatcher | None
    ) -> None:
        """`stop_token_ids`: those that end the sequence (see `stop_conditions`)."""
        self.sequence = sequence
        self.params = params = sequence.request.sampling
        self.seed = seed
        self.stop_token_ids = stop_token_ids
        self.matcher = matcher
        bad_words = sequence.request.bad_words_token_ids
        self.bad_words = BadWords(bad_words)
        has_penalty = params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
        self.counts = TokenCounts(sequence.request.prompt_token_ids) if has_penalty else None
        self.is_plain = not (matcher or has_penalty or params.min_tokens or params.logit_bias or bad_words)
        """Whether the logits are taken as they are, but for temperature and truncation."""

    def append(self, token_id: int) -> RequestError | None:
        """Takes a token that was sampled; returns what is wrong if the guide does not take it."""
        if self.counts is not None:
            self.counts.add(token_id)
        return None if self.matcher is None else self.matcher.accept(token_id)

    @property
    def must_not_stop(self) -> bool:
        """Whether the next token is one of the first `min_tokens`: stop tokens are masked then."""
        return self.sequence.num_generated_tokens < self.params.min_tokens

    @property
    def is_guide_complete(self) -> bool:
        """Whether the guide lets nothing follow but the end."""
        return self.matcher is not None and self.matcher.is_complete


@dataclass(slots=True)
class SampledToken:
    """What sampling gave one sequence: a token, or why there is none."""

    token_id: int
    logprobs: list[TokenLogprob]
    error: RequestError | None = None


class Sampler:
    """Chooses the next token of each sequence of a batch. It changes nothing but the logits it is given."""

    def __init__(self, eos_token_ids: list[int], vocab_size: int) -> None:
        """`vocab_size`: the model's. An end token beyond it, as a tokenizer may have, never comes."""
        self._eos_token_ids = [token_id for token_id in eos_token_ids if token_id < vocab_size]

    def start(self, sequence: Sequence, guide: CompiledGuide | None) -> SamplingState:
        """The state for a sequence that begins."""
        params = sequence.request.sampling
        seed = secrets.randbits(64) if params.seed is None else params.seed
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
            None if state.is_plain else _process_logits(logits[row], state)
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
            greedy = logits.argmax(dim=-1)
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


def not_finite(position: int) -> RequestError:
    """The error for a sequence for which the model gives NaN or infinity after the token at `position`."""
    return RequestError(
        f"the model's numbers are not finite (NaN or infinity) after token {position} of the sequence, as "
        "when float16 overflows: serve the model with another `dtype`",
        ErrorCode.INTERNAL,
    )


def _no_token(peak: float, state: SamplingState) -> RequestError:
    """Why nothing can be drawn from a row whose largest logit is no finite number."""
    sequence = state.sequence
    if peak == -math.inf and (restrictions := _restrictions(state)):
        return RequestError(
            f"{' and '.join(restrictions)}: after {sequence.num_generated_tokens} tokens no token of the "
            "model is left that may follow"
        )
    return not_finite(sequence.num_tokens - 1)


def _restrictions(state: SamplingState) -> list[str]:
    """The request's parameters that forbid tokens now."""
    restrictions = ["`structured_outputs`"] if state.matcher is not None else []
    if state.must_not_stop and state.stop_token_ids:
        restrictions.append("`min_tokens`")
    if state.bad_words.banned(state.sequence):
        restrictions.append("`bad_words`")
    return restrictions


def token_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, counts: list[int]
) -> list[list[TokenLogprob]]:
    """Per row of logits [n, vocab]: (id, logprob, rank) of token_ids[row], then of the likeliest."""
    most = min(max(counts), logits.shape[1])
    chosen, ranks, top_ids, top = ops.log_probs(logits, token_ids, most)
    rows = zip(
        token_ids.tolist(), chosen.tolist(), ranks.tolist(), top_ids.tolist(), top.tolist(), strict=True
    )
    return [
        [(token, logprob, chosen_rank)]
        + [
            (other, value, rank)
            for rank, (other, value) in enumerate(zip(ids[:count], values, strict=False), start=1)
        ]
        for count, (token, logprob, chosen_rank, ids, values) in zip(counts, rows, strict=True)
    ]


def sequence_seed(seed: int, index: int) -> int:
    """The seed of sequence `index` of a request: for 0 the request's own, for others a hash of both.

    A sum of both would give two requests of neighboring seeds the same texts.
    """
    own = seed % 2**64
    if index == 0:
        return own
    # No position in a text reaches 2**63, so that no number of this kind is one that a token was drawn with.
    return int(_hash(np.array([own], dtype=np.uint64), np.array([2**63 + index], dtype=np.uint64))[0])


def uniform_numbers(seeds: list[int], positions: list[int]) -> np.ndarray:
    """Uniform numbers [n] float64 in [0, 1), each a hash of its seed and position alone, 53 bits of it."""
    mixed = _hash(np.array(seeds, dtype=np.uint64), np.array(positions, dtype=np.uint64))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _hash(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Two rounds of the SplitMix64 finalizer (Steele, Lea, Flood, OOPSLA 2014) over uint64 [n]."""
    with np.errstate(over="ignore"):
        mixed: np.ndarray = _splitmix(_splitmix(seeds) ^ _splitmix(positions))
    return mixed


def _splitmix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _process_logits(logits: torch.Tensor, state: SamplingState) -> RequestError | None:
    """Applies to one row [vocab] what its request asks for beyond temperature and truncation."""
    params = state.params
    if state.matcher is not None:
        error = state.matcher.mask(logits)
        if error is not None:
            return error
    if state.must_not_stop:
        logits[state.stop_token_ids] = -torch.inf
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(
            list(params.logit_bias.values()), dtype=logits.dtype, device=logits.device
        )
    banned = state.bad_words.banned(state.sequence)
    if banned:
        logits[banned] = -torch.inf
    if state.counts is not None:
        _apply_penalties(logits, state.counts, params)
    return None


def _apply_penalties(logits: torch.Tensor, tokens: TokenCounts, params: SamplingParams) -> None:
    """Repetition penalty (Keskar et al., arXiv 1909.05858) over prompt and answer, others over the answer."""
    ids = torch.from_numpy(tokens.ids).to(logits.device)
    values = logits[ids]
    if params.repetition_penalty != 1.0:
        values = torch.where(
            values > 0, values / params.repetition_penalty, values * params.repetition_penalty
        )
    if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        counts = tokens.counts
        penalty = params.presence_penalty * (counts > 0) + params.frequency_penalty * counts
        values -= torch.from_numpy(penalty).to(values)
    logits[ids] = values
