"""Shortest remaining processing time: what a policy could reach that knew the length of every answer."""

from __future__ import annotations

from typing import ClassVar

from fastserve.scheduling.policies.policy import Policy, Rank
from fastserve.types import RequestView


class SRPT(Policy):
    """The fewest tokens still to be computed first. In the simulator alone, which knows them beforehand.

    It has the least mean completion time on one machine (Schrage, 1968), and starves long requests.
    """

    preempts_at_a_loss: ClassVar[bool] = False

    def rank(self, view: RequestView, now: float) -> Rank:
        """(tokens still to be computed,)"""
        return (max(1, view.num_prompt_tokens + view.expected_output_tokens - view.num_served_tokens),)

    def on_service(
        self, view: RequestView, num_prompt_tokens: int, num_output_tokens: int, now: float
    ) -> bool:
        """Less remains."""
        return True

    def tokens_at_once(self, view: RequestView) -> int | None:
        """However many: its rank only becomes better."""
        return None
