"""The default model as our engine loads it, an engine over a fake runner, and requests for both."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from fastserve.checkpoints.model_files import ModelFiles
from fastserve.config import Config
from fastserve.engine.engine import Engine
from fastserve.engine.engine_loader import load_engine
from fastserve.engine.guides import GuideCompiler
from fastserve.engine.model_runner import ModelRunner
from fastserve.engine.sampler import Sampler
from fastserve.errors import ErrorCode
from fastserve.scheduling.block_pool import BlockPool
from fastserve.scheduling.iteration_scheduler import IterationScheduler
from fastserve.scheduling.policies.priority_age import PriorityAge
from fastserve.scheduling.sequence import StepPlan
from fastserve.types import Add, Outcome, OutputOptions, Request, SamplingParams, SequenceOutput
from fastserve_kernels.attention_metadata import AttentionMetadata

MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="session")
def make_engine(default_model: ModelFiles) -> MakeEngine:
    """An engine with these settings; of fp32 weights unless told otherwise."""

    def make(**settings: Any) -> Engine:
        return load_engine(
            Config(**{"dtype": "float32", "kv_cache_bytes": 1 << 28, **settings}), default_model
        )

    return make


class FakeModel:
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.clone()


class FakeRunner:
    """A model runner without a model: the scores after a token are random, seeded by all tokens before it.

    They are read back from a paged cache, so that a block or slot that is not the sequence's own shows in its
    text. Raises for a plan that computes one of the tokens `poison`, but writes all keys first.

    After one of the tokens `nan` the numbers are not finite.
    """

    def __init__(self, vocab_size: int, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        self.model = FakeModel(vocab_size)
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.poison: set[int] = set()
        self.nan: set[int] = set()
        self.is_lost = False
        """Whether nothing can be computed any more."""
        self.num_runs = self.num_tokens = 0
        self._cache = np.full((num_blocks, block_size), -1, dtype=np.int64)
        self._host = np.full((num_host_blocks, block_size), -1, dtype=np.int64)

    def probe(self) -> None:
        if self.is_lost:
            raise RuntimeError("the device is lost")

    def copy_blocks(self, plan: StepPlan) -> None:
        for block, host_block in plan.copies_out:
            self._host[host_block] = self._cache[block]
        for host_block, block in plan.copies_in:
            self._cache[block] = self._host[host_block]

    def run(self, plan: StepPlan) -> tuple[torch.Tensor, AttentionMetadata]:
        self.num_runs += 1
        self.num_tokens += plan.num_tokens
        self.probe()
        rows, poisoned = [], None
        for item in plan.scheduled:
            sequence = item.sequence
            table = np.array(sequence.block_table)
            for position in range(
                sequence.num_computed_tokens, sequence.num_computed_tokens + item.num_tokens
            ):
                token = sequence.token_ids[position]
                poisoned = token if token in self.poison else poisoned
                self._cache[table[position // self.block_size], position % self.block_size] = token
                rows.append(self._scores(self._cache[table].flatten()[: position + 1]))
        if poisoned is not None:
            raise RuntimeError(f"token {poisoned} is poison")
        return torch.from_numpy(np.stack(rows)), self._metadata(plan)

    def _scores(self, context: np.ndarray) -> np.ndarray:
        if context[-1] in self.nan:
            return np.full(self.model.vocab_size, np.nan, dtype=np.float32)
        seed = np.random.default_rng(context + 1)
        return seed.standard_normal(self.model.vocab_size, dtype=np.float32) * 3

    def _metadata(self, plan: StepPlan) -> AttentionMetadata:
        ends = [item.sequence.num_computed_tokens + item.num_tokens for item in plan.scheduled]
        return AttentionMetadata.build(
            [item.num_tokens for item in plan.scheduled],
            ends,
            [item.sequence.block_table for item in plan.scheduled],
            self.block_size,
            self.model.device,
        )


@pytest.fixture
def fake_engine(tmp_path: Path) -> MakeEngine:
    """An engine over a `FakeRunner`, which is its `_runner`. It takes microseconds a token."""

    def make(
        vocab_size: int = 60,
        num_blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 16,
        max_num_batched_tokens: int = 64,
        eos_token_ids: tuple[int, ...] = (),
        tokenizer: Path = tmp_path,
        prefix_caching: bool = True,
        num_host_blocks: int = 0,
        has_common_queue: bool = False,
    ) -> Engine:
        runner = FakeRunner(vocab_size, num_blocks, block_size, num_host_blocks)
        pool = BlockPool(num_blocks, block_size, prefix_caching, num_host_blocks)
        policy = PriorityAge(alpha=10.0, beta=1.0)
        return Engine(
            cast(ModelRunner, runner),
            IterationScheduler(pool, policy, max_num_seqs, max_num_batched_tokens),
            Sampler(list(eos_token_ids), vocab_size),
            GuideCompiler(tokenizer, list(eos_token_ids), vocab_size),
            num_blocks * block_size,
            has_common_queue,
        )

    return make


def make_request(
    uid: str,
    prompt_token_ids: list[int],
    priority: int = 0,
    bad_words: Sequence[list[int]] = (),
    **sampling: Any,
) -> Request:
    return Request(
        uid=uid,
        request_id=uid,
        prompt="",
        prompt_token_ids=prompt_token_ids,
        sampling=SamplingParams(**sampling),
        output=OutputOptions(),
        priority=priority,
        tenant="",
        arrival=time.monotonic(),
        deadline=None,
        bad_words_token_ids=list(bad_words),
    )


def make_add(*arguments: Any, **sampling: Any) -> Add:
    """The message that takes a request of `make_request` in."""
    return Add(make_request(*arguments, **sampling))


def run_until_idle(engine: Engine) -> dict[str, list[SequenceOutput]]:
    """Steps the engine until it has no work; all outputs by request."""
    outputs: dict[str, list[SequenceOutput]] = {}
    while engine.has_work:
        for output in engine.step().outputs:
            outputs.setdefault(output.uid, []).append(output)
    return outputs


def tokens_of(outputs: list[SequenceOutput], index: int = 0) -> list[int]:
    return [token for output in outputs if output.index == index for token in output.token_ids]


def assert_refused(outputs: list[SequenceOutput], words: str) -> None:
    """All that came of a request is an error that says this."""
    (output,) = outputs
    assert output.outcome is Outcome.ERROR
    assert output.failure is not None
    assert output.failure.code == ErrorCode.INVALID_ARG.value
    assert words in output.failure.message


@pytest.fixture(scope="session")
def helpers() -> Any:
    """The functions of this file."""

    class Helpers:
        make_request = staticmethod(make_request)
        make_add = staticmethod(make_add)
        run_until_idle = staticmethod(run_until_idle)
        tokens_of = staticmethod(tokens_of)
        assert_refused = staticmethod(assert_refused)

    return Helpers
