"""The service that sequences have had: what a policy is told of."""

from __future__ import annotations

from msgspec.structs import replace

from fastserve.scheduling.policies.policy import Policy
from fastserve.scheduling.sequence import Sequence
from fastserve.types import RequestView


class ServiceCounter:
    """Counts each token once, however often it is computed."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._policy_counts = policy.overrides(Policy.on_service)
        self.num_recomputed_tokens = 0
        """Tokens that were computed again after a preemption."""

    def count(self, sequence: Sequence, num_tokens: int, now: float) -> None:
        """Tells the policy of the tokens that were computed for the first time."""
        view = sequence.view
        before = view.num_served_tokens
        new = sequence.num_computed_tokens - before
        if num_tokens > new:
            self._count_recomputed(view, num_tokens - max(0, new))
        if new <= 0:
            return
        view.num_served_tokens += new
        if self._policy_counts:
            num_prompt_tokens = min(new, max(0, view.num_prompt_tokens - before))
            if self._told_policy(view, num_prompt_tokens, new - num_prompt_tokens, now):
                sequence.rank = self._policy.rank(view, now)

    def _count_recomputed(self, view: RequestView, num_tokens: int) -> None:
        self.num_recomputed_tokens += num_tokens
        had = view.preemptions.num_recomputed_tokens
        view.preemptions = replace(view.preemptions, num_recomputed_tokens=had + num_tokens)

    def _told_policy(
        self, view: RequestView, num_prompt_tokens: int, num_output_tokens: int, now: float
    ) -> bool:
        """Whether its rank has changed. Many tokens of an answer are told as if they came one by one."""
        policy = self._policy
        if num_prompt_tokens or num_output_tokens == 1:
            return policy.on_service(view, num_prompt_tokens, num_output_tokens, now)
        has_changed = False
        while num_output_tokens:
            at_once = min(num_output_tokens, policy.tokens_at_once(view) or num_output_tokens)
            has_changed |= policy.on_service(view, 0, at_once, now)
            num_output_tokens -= at_once
        return has_changed
