"""Which of a sequence's proposed tokens are right, as its tokens are drawn one after another."""

from __future__ import annotations

import torch

from fastserve.engine.sampler import SampledToken
from fastserve.scheduling.sequence import ScheduledSequence


class Verification:
    """The proposals for one sequence in one step."""

    def __init__(self, item: ScheduledSequence, token: SampledToken) -> None:
        """`token`: the step's own, with the logits behind what was proposed."""
        self.item = item
        self.token: SampledToken | None = token
        """The one that was drawn last."""
        self._following = token.following
        self.num_accepted = 0

    def accept(self) -> bool:
        """Whether the token that was drawn last was proposed, and the next can be drawn, from `logits`."""
        if self.token is None or self.num_accepted == len(self._following):
            return False
        if self.token.token_id != self.item.proposed[self.num_accepted]:
            return False
        self.num_accepted += 1
        return True

    @property
    def logits(self) -> torch.Tensor:
        """[vocab], behind the last token that was accepted."""
        return self._following[self.num_accepted - 1]
