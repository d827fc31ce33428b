"""An engine that is stepped by hand, and what each of its steps computes and takes."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fastserve.config import Config
from fastserve.engine.engine import Engine
from fastserve.simulation.step_time import StepWork, prompt_pairs
from fastserve.types import Add, Outcome, OutputOptions, Request, SamplingParams
from fastserve.workload.prompts import TOKEN_IDS

SPARE_TOKENS = 192
"""For what a sequence may generate before it is cleared away."""


class StepSample(NamedTuple):
    """A step that was measured."""

    work: StepWork
    seconds: float


@dataclass
class _Driven:
    """A sequence in the engine."""

    uid: str
    num_prompt_tokens: int
    num_computed_tokens: int = 0


class EngineDriver:
    """Gives an engine sequences that do not end, and knows what each of its steps computes.

    It repeats the iteration scheduler's third move: a token for each decode, then prompts in chunks, by
    arrival. Every step is held against the number of tokens that the engine says it computed.
    """

    def __init__(self, engine: Engine, config: Config, seed: int) -> None:
        """`config`: that of the engine, which nobody else uses meanwhile."""
        self._engine = engine
        self._config = config
        self._random = np.random.default_rng(seed)
        self._driven: list[_Driven] = []
        """By arrival."""

    @property
    def num_sequences(self) -> int:
        """Sequences in the engine."""
        return len(self._driven)

    def add(self, lengths: Sequence[int]) -> bool:
        """Adds prompts of these lengths, unlike any before. False, and none is added, if they do not fit into
        the batch and the cache beside what is there."""
        tokens = [each.num_prompt_tokens + SPARE_TOKENS for each in self._driven]
        tokens += [length + SPARE_TOKENS for length in lengths]
        block_size = self._config.block_size
        if (
            len(tokens) > self._config.max_num_seqs
            or sum(tokens) > (self._engine.stats().kv_blocks_total - len(tokens)) * block_size
            or max(tokens) > self._engine.max_model_len
        ):
            return False
        for length in lengths:
            self._driven.append(_Driven(uuid.uuid4().hex, length))
            self._engine.add(Add(self._request(self._driven[-1])))
        return True

    def _request(self, driven: _Driven) -> Request:
        token_ids = self._random.integers(TOKEN_IDS.start, TOKEN_IDS.stop, driven.num_prompt_tokens)
        return Request(
            uid=driven.uid,
            request_id="",
            prompt="",
            prompt_token_ids=token_ids.tolist(),
            sampling=SamplingParams(max_tokens=self._engine.max_model_len, temperature=0.0, ignore_eos=True),
            output=OutputOptions(),
            priority=0,
            tenant="",
            arrival=time.monotonic(),
            deadline=None,
        )

    def step(self) -> StepSample:
        """Steps the engine. Raises RuntimeError if it computed something else than is known here."""
        work = self._advance()
        start = time.perf_counter()
        output = self._engine.step()
        seconds = time.perf_counter() - start
        expected = work.num_prompt_tokens + work.num_decode_tokens
        if output.stats.step_tokens != expected:
            raise RuntimeError(f"a step computed {output.stats.step_tokens} tokens, not {expected}")
        return StepSample(work, seconds)

    def run(self, num_steps: int) -> list[StepSample]:
        """That many steps."""
        return [self.step() for _ in range(num_steps)]

    def run_prompts(self) -> Iterator[StepSample]:
        """Steps until all prompts are computed."""
        while any(each.num_computed_tokens < each.num_prompt_tokens for each in self._driven):
            yield self.step()

    def clear(self) -> None:
        """Takes all sequences out of the engine."""
        for each in self._driven:
            self._engine.cancel(each.uid, Outcome.CANCELLED)
        self._driven = []
        while self._engine.has_work:
            self._engine.step()

    def _advance(self) -> StepWork:
        """The work of the next step, after which it counts as computed."""
        prompts = [each for each in self._driven if each.num_computed_tokens < each.num_prompt_tokens]
        decodes = [each for each in self._driven if each.num_computed_tokens >= each.num_prompt_tokens]
        for each in decodes:
            each.num_computed_tokens += 1
        budget = self._config.max_num_batched_tokens - len(decodes)
        num_sequences, num_prompt_tokens, num_pairs = len(decodes), 0, 0
        for each in prompts:
            chunk = min(budget - num_prompt_tokens, each.num_prompt_tokens - each.num_computed_tokens)
            num_sequences += chunk > 0
            num_pairs += prompt_pairs(each.num_computed_tokens, chunk)
            num_prompt_tokens += chunk
            each.num_computed_tokens += chunk
        num_context_tokens = sum(each.num_computed_tokens for each in decodes)
        return StepWork(num_sequences, num_prompt_tokens, len(decodes), num_context_tokens, num_pairs)
