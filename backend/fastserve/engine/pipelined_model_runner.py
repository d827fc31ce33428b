"""A model runner whose layers are dealt out to stages: the first begins a step, and has its result later.

Rank 0 is, or leads, the first stage: it plans, computes its layers, and sends what the others need along with
the hidden states. Each stage sends them on; those of the last come back to the first, which has the head.
What goes to the stages besides, as copies of blocks, goes the same way, so that all do all in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from fastserve.engine.model_runner import ModelRunner
from fastserve.engine.ranked_model_runner import FORWARD, PROBE, copy_words, perform, step_words
from fastserve.engine.ranks import Ranks
from fastserve.engine.stage_link import StageLink
from fastserve.models.decoder import Decoder
from fastserve.models.kv_cache import KVCaches
from fastserve.scheduling.sequence import StepPlan
from fastserve_kernels.attention_metadata import AttentionMetadata
from fastserve_kernels.process_group import ProcessGroup, RankLostError


class PipelinedModelRunner(ModelRunner):
    """That of rank 0."""

    def __init__(self, stage: ModelRunner, ranks: Ranks, following: StageLink, last: StageLink) -> None:
        """`stage`: of the first stage, loaded and warm; `following`: the link to the second one; `last`: that
        from the last one."""
        vars(self).update(vars(stage))
        self._stage = stage
        self._ranks = ranks
        self._following = following
        self._last = last
        self._num_begun = self._num_received = 0
        self._results: dict[int, Tensor] = {}
        """Hidden states that came while those of a later step were waited for, by the step's number."""
        self._is_broken = False
        ranks.watch(self)

    def start(self, plan: StepPlan) -> Callable[[], Tensor]:
        """See `ModelRunner`. It and what it returns raise RankLostError."""
        return self._begin(*self.step_inputs(plan))

    def run(self, plan: StepPlan) -> Tensor:
        """See `ModelRunner`. Raises RankLostError."""
        return self.start(plan)()

    def forward(self, token_ids: Tensor, metadata: AttentionMetadata) -> Tensor:
        """See `ModelRunner`. Raises RankLostError."""
        return self._begin(token_ids, metadata)()

    @torch.inference_mode()
    def _begin(self, token_ids: Tensor, metadata: AttentionMetadata) -> Callable[[], Tensor]:
        with self._or_none():
            hidden = self._stage.forward(token_ids, metadata)
            self._following.send(step_words(token_ids, metadata), hidden)
        self._num_begun += 1
        return partial(self._result, self._num_begun)

    def _result(self, number: int) -> Tensor:
        with self._or_none():
            while number not in self._results:
                (hidden,) = self._last.receive()
                self._num_received += 1
                self._results[self._num_received] = hidden
        return self._results.pop(number)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `ModelRunner`. Raises RankLostError."""
        return self._stage.logits(hidden)

    def copy_blocks(self, plan: StepPlan) -> None:
        """See `ModelRunner`. Raises RankLostError."""
        if plan.copies_out or plan.copies_in:
            with self._or_none():
                self._stage.copy_blocks(plan)
                self._following.send(copy_words(plan))

    def probe(self) -> None:
        """See `ModelRunner`. Raises RankLostError."""
        with self._or_none():
            self._stage.probe()
            self._following.send(torch.tensor([PROBE]))

    @contextmanager
    def _or_none(self) -> Iterator[None]:
        """An exception in the midst of it ends all ranks: they would not have done the same any more."""
        if self._is_broken:
            raise RankLostError("the ranks have ended")
        try:
            yield
        except BaseException:
            self._is_broken = True
            self._ranks.abort()
            raise


class LaterStageRunner(ModelRunner):
    """That of a rank of another stage than the first: hidden states go in, and it has no head."""

    def _compute_zeros(
        self, num_tokens: int, context_len: int, blocks: list[int], kv_caches: KVCaches
    ) -> Tensor:
        assert isinstance(self.model, Decoder)
        metadata = AttentionMetadata.build(
            [num_tokens], [context_len], [blocks], self.block_size, self.model.device
        )
        return self.model.forward(self.model.zeros(num_tokens), metadata, kv_caches)


def lead_stage(
    runner: ModelRunner, group: ProcessGroup | None, previous: StageLink, following: StageLink, is_last: bool
) -> None:
    """Does what the stage before says, with the ranks of its own stage, and has the next one go on.

    Raises RankLostError when a rank is gone.
    """
    with torch.inference_mode():
        while True:
            words, *hidden = message = previous.receive()
            if group is not None:
                for tensor in message:
                    group.broadcast(tensor)
            output = perform(runner, words, hidden)
            if group is not None:
                group.check()
            if words[0] == FORWARD and is_last:
                following.send(output)
            elif not is_last:
                following.send(words, *([output] if hidden else []))
