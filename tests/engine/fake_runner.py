"""An engine over a model runner without a model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch

from fastserve.engine.engine import Engine
from fastserve.engine.guides import GuideCompiler
from fastserve.engine.model_runner import ModelRunner
from fastserve.engine.sampler import Sampler
from fastserve.engine.speculator import Speculator
from fastserve.scheduling.block_pool import BlockPool
from fastserve.scheduling.iteration_scheduler import IterationScheduler
from fastserve.scheduling.policies.priority_age import PriorityAge
from fastserve.scheduling.sequence import StepPlan


class FakeModel:
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size


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

    def start(self, plan: StepPlan) -> Callable[[], torch.Tensor]:
        return partial(self.run, plan)

    def probe(self) -> None:
        if self.is_lost:
            raise RuntimeError("the device is lost")

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.clone()

    def copy_blocks(self, plan: StepPlan) -> None:
        for block, host_block in plan.copies_out:
            self._host[host_block] = self._cache[block]
        for host_block, block in plan.copies_in:
            self._cache[block] = self._host[host_block]

    def run(self, plan: StepPlan) -> torch.Tensor:
        self.num_runs += 1
        self.num_tokens += plan.num_tokens
        self.probe()
        rows, poisoned = [], None
        for item in plan.scheduled:
            sequence, start = item.sequence, item.sequence.num_computed_tokens
            table = np.array(sequence.block_table)
            tokens = [*sequence.token_ids[start : start + item.num_tokens], *item.proposed]
            for position, token in enumerate(tokens, start):
                poisoned = token if token in self.poison else poisoned
                self._cache[table[position // self.block_size], position % self.block_size] = token
                rows.append(self._scores(self._cache[table].flatten()[: position + 1]))
        if poisoned is not None:
            raise RuntimeError(f"token {poisoned} is poison")
        return torch.from_numpy(np.stack(rows))

    def _scores(self, context: np.ndarray) -> np.ndarray:
        if context[-1] in self.nan:
            return np.full(self.model.vocab_size, np.nan, dtype=np.float32)
        seed = np.random.default_rng(context + 1)
        return seed.standard_normal(self.model.vocab_size, dtype=np.float32) * 3


def make_fake_engine(
    vocab_size: int = 60,
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 16,
    max_num_batched_tokens: int = 64,
    eos_token_ids: tuple[int, ...] = (),
    tokenizer: Path = Path("none"),
    prefix_caching: bool = True,
    num_host_blocks: int = 0,
    has_common_queue: bool = False,
    takes_all_cores: bool = False,
    num_speculative_tokens: int = 0,
) -> Engine:
    """An engine whose `runner` is a `FakeRunner`."""
    runner = FakeRunner(vocab_size, num_blocks, block_size, num_host_blocks)
    pool = BlockPool(num_blocks, block_size, prefix_caching, num_host_blocks)
    policy = PriorityAge(alpha=10.0, beta=1.0)
    return Engine(
        cast(ModelRunner, runner),
        IterationScheduler(pool, policy, max_num_seqs, max_num_batched_tokens),
        Sampler(list(eos_token_ids), vocab_size),
        GuideCompiler(tokenizer, list(eos_token_ids), vocab_size),
        Speculator(num_speculative_tokens, max_num_batched_tokens, num_blocks * block_size),
        num_blocks * block_size,
        has_common_queue,
        takes_all_cores,
    )
