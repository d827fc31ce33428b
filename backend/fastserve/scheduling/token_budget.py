"""The token budget of a step: how large it is, and how it is shared out."""

from __future__ import annotations

from fastserve.scheduling.policies.policy import Rank
from fastserve.scheduling.sequence import ScheduledSequence, Sequence

SMOOTHING = 0.2
"""The weight of the last step in the moving averages."""
MIN_PROMPT_TOKENS = 16
"""A prompt advances by so many tokens a step at least, whatever the target."""


class TokenBudget:
    """So many tokens as a step may compute: a fixed number or, where prompts would delay decodes, as many as
    keep the step within the target.

    A step takes the seconds of its decodes, and a time for each prompt token; both are moving averages of the
    steps that were computed.
    """

    def __init__(self, max_num_batched_tokens: int, target_itl_seconds: float = 0.0) -> None:
        """`target_itl_seconds`: between two tokens of a stream; 0: no target."""
        self._max_tokens = max_num_batched_tokens
        self._target = target_itl_seconds
        self._decode_seconds = 0.0
        """Of a step without prompts."""
        self.prompt_token_seconds = 0.0
        """0: no prompt has been computed yet."""

    def tokens(self, num_decodes: int) -> int:
        """The budget of a step in which so many sequences decode, their own tokens included."""
        if not (self._target and num_decodes and self.prompt_token_seconds):
            return self._max_tokens
        affordable = (self._target - self._decode_seconds) / self.prompt_token_seconds
        return min(self._max_tokens, num_decodes + max(MIN_PROMPT_TOKENS, int(affordable)))

    def observe(self, num_prompt_tokens: int, seconds: float, num_steps: int = 1) -> None:
        """Learns what a step has taken, `num_steps` times: all of it counts as the decodes' where it had no
        prompt tokens."""
        if num_prompt_tokens == 0:
            self._decode_seconds = _average(self._decode_seconds, seconds, num_steps)
        else:
            per_token = max(0.0, seconds - self._decode_seconds) / num_prompt_tokens
            self.prompt_token_seconds = _average(self.prompt_token_seconds, per_token, num_steps)


def _average(average: float, value: float, count: int) -> float:
    """The moving average after `count` times `value`."""
    return value + (average - value) * (1 - SMOOTHING) ** count if average else value


def order_of(sequence: Sequence) -> tuple[Rank, float, int]:
    """The lowest goes first: by the policy's rank, then by arrival, then by index."""
    return (sequence.rank, sequence.request.arrival, sequence.index)


def share_budget(running: list[Sequence], budget: TokenBudget) -> list[ScheduledSequence]:
    """Decodes, then chunks of prompts; both by rank, in which `running` is."""
    scheduled, prompts = [], []
    for sequence in running:
        if sequence.num_tokens - sequence.num_computed_tokens == 1:
            scheduled.append(ScheduledSequence(sequence, 1))
        else:
            prompts.append(sequence)
    left = budget.tokens(len(scheduled)) - len(scheduled)
    for sequence in prompts:
        if left == 0:
            break
        chunk = min(left, sequence.num_tokens - sequence.num_computed_tokens)
        scheduled.append(ScheduledSequence(sequence, chunk))
        left -= chunk
    return scheduled
