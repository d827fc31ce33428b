"""A model runner whose model several ranks compute: the first one says what, the others do the same.

Nothing is planned or sampled elsewhere than on rank 0. Each step goes to the others as one broadcast of its
tensors; all ranks then run the same forward pass, which has the all-reduces in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

    def __init__(self, runner: ModelRunner, ranks: Ranks, group: ProcessGroup) -> None:
        """`runner`: with rank 0's part of the model, loaded and warm."""
        vars(self).update(vars(runner))
        self._ranks = ranks
        self._group = group
        ranks.watch(self)

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, metadata: AttentionMetadata) -> Tensor:
        """See `ModelRunner`. Raises RankLostError."""
        with self._together(step_words(token_ids, metadata)):
            return super().forward(token_ids, metadata)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """See `ModelRunner`. Raises RankLostError."""
        with self._together(torch.tensor([LOGITS])):
            self._group.broadcast(hidden)
            return super().logits(hidden)

    def copy_blocks(self, plan: StepPlan) -> None:
        """See `ModelRunner`. Raises RankLostError."""
        if plan.copies_out or plan.copies_in:
            with self._together(copy_words(plan)):
                super().copy_blocks(plan)

    def probe(self) -> None:
        """See `ModelRunner`. Raises RankLostError."""
        with self._together(torch.tensor([PROBE])):
            super().probe()

    @contextmanager
    def _together(self, words: Tensor) -> Iterator[None]:
        """Tells the others; an exception in the midst of it ends the group: they would wait for ever."""
        try:
            self._group.broadcast(words)
            yield
            self._group.check()
        except BaseException:
            self._ranks.abort()
            raise


def follow(runner: ModelRunner, group: ProcessGroup, is_first_stage: bool) -> None:
    """Does what the first rank of the group says. Raises RankLostError when a rank is gone."""
    with torch.inference_mode():
        while True:
            words = group.broadcast(None)
            has_hidden = words[0] == LOGITS or (words[0] == FORWARD and not is_first_stage)
            perform(runner, words, [group.broadcast(None)] if has_hidden else [])
            group.check()


def perform(runner: ModelRunner, words: Tensor, hidden: Sequence[Tensor]) -> Tensor:
    """Does what was broadcast, or sent to a stage; returns hidden states [T, hidden] of a forward pass.

    `hidden`: those that go into another stage than the first, or into the head.
    """
    kind = words[0]
    if kind == FORWARD:
        token_ids, metadata = _read_step(words, runner.block_size)
        return runner.forward(hidden[0] if hidden else token_ids, metadata)
    if kind == LOGITS:
        return runner.logits(hidden[0])
    if kind == COPY:
        pairs = [(int(one), int(other)) for one, other in words[2:].view(-1, 2)]
        runner.copy_blocks(StepPlan([], [], pairs[: words[1]], pairs[words[1] :]))
    else:
        runner.probe()
    return words


def copy_words(plan: StepPlan) -> Tensor:
    """What `perform` reads: how many blocks are copied out, then all pairs."""
    pairs = [number for pair in (*plan.copies_out, *plan.copies_in) for number in pair]
    return torch.tensor([COPY, len(plan.copies_out), *pairs])


def step_words(token_ids: Tensor, metadata: AttentionMetadata) -> Tensor:
    """What `perform` reads: sizes, then the tensors."""
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
