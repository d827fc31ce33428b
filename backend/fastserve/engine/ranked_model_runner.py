"""A model runner whose model several ranks compute: the first one says what, the others do the same.

Nothing is planned or sampled elsewhere than on rank 0. Each step goes to the others as one broadcast of its
tensors; all ranks then run the same forward pass, which has the all-reduces in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastserve.engine.model_runner import ModelRunner
from fastserve.engine.ranks import Ranks
from fastserve.scheduling.sequence import StepPlan
from fastserve_kernels.attention_metadata import AttentionMetadata
from fastserve_kernels.process_group import ProcessGroup

FORWARD, LOGITS, COPY, PROBE = range(4)
"""The first word of a broadcast: what all ranks do next."""


class RankedModelRunner(ModelRunner):
    """That of rank 0: what it does the others do too."""

    def __init__(self, runner: ModelRunner, ranks: Ranks) -> None:
        """`runner`: with rank 0's part of the model, loaded and warm."""
        vars(self).update(vars(runner))
        self._ranks = ranks
        ranks.watch(self)

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, metadata: AttentionMetadata) -> Tensor:
        """See `ModelRunner`. Raises RankLostError."""
        with self._together(_step_words(token_ids, metadata)):
            return super().forward(token_ids, metadata)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """See `ModelRunner`. Raises RankLostError."""
        with self._together(torch.tensor([LOGITS])):
            self._ranks.group.broadcast(hidden)
            return super().logits(hidden)

    def copy_blocks(self, plan: StepPlan) -> None:
        """See `ModelRunner`. Raises RankLostError."""
        if plan.copies_out or plan.copies_in:
            pairs = [number for pair in (*plan.copies_out, *plan.copies_in) for number in pair]
            with self._together(torch.tensor([COPY, len(plan.copies_out), *pairs])):
                super().copy_blocks(plan)

    def probe(self) -> None:
        """See `ModelRunner`. Raises RankLostError."""
        with self._together(torch.tensor([PROBE])):
            super().probe()

    @contextmanager
    def _together(self, words: Tensor) -> Iterator[None]:
        """Tells the others; an exception in the midst of it ends the group: they would wait for ever."""
        group = self._ranks.group
        try:
            group.broadcast(words)
            yield
            group.check()
        except BaseException:
            group.abort()
            raise


def follow(runner: ModelRunner, group: ProcessGroup) -> None:
    """Does what rank 0 says. Raises RankLostError when a rank is gone."""
    with torch.inference_mode():
        while True:
            kind, *_ = words = group.broadcast(None)
            if kind == FORWARD:
                runner.forward(*_read_step(words, runner.block_size))
            elif kind == LOGITS:
                runner.logits(group.broadcast(None))
            elif kind == COPY:
                pairs = [(int(one), int(other)) for one, other in words[2:].view(-1, 2)]
                runner.copy_blocks(StepPlan([], [], pairs[: words[1]], pairs[words[1] :]))
            else:
                runner.probe()
            group.check()


def _step_words(token_ids: Tensor, metadata: AttentionMetadata) -> Tensor:
    """What `_read_step` reads: sizes, then the tensors."""
    num_sequences, width = metadata.block_tables.shape
    return torch.cat(
        (
            torch.tensor([FORWARD, len(token_ids), num_sequences, width]),
            token_ids,
            metadata.query_start,
            metadata.context_lens,
            metadata.block_tables.flatten(),
            metadata.positions,
            metadata.slot_mapping,
        )
    )


def _read_step(words: Tensor, block_size: int) -> tuple[Tensor, AttentionMetadata]:
    """Token ids [T], and the step's metadata."""
    _, num_tokens, num_sequences, width = words[:4].tolist()
    sizes = [num_tokens, num_sequences + 1, num_sequences, num_sequences * width, num_tokens, num_tokens]
    token_ids, query_start, context_lens, block_tables, positions, slots = words[4:].split(sizes)
    tables = block_tables.view(num_sequences, width)
    return token_ids, AttentionMetadata(query_start, context_lens, tables, positions, slots, block_size)
