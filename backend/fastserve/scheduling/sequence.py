"""A sequence: one continuation of one request's prompt, and the plan of a step over several of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastserve.types import Request


@dataclass(eq=False, slots=True)
class Sequence:
    """One of the `n` continuations of a request, from admission to its last token.

    There is no "prefill phase" and no "decode phase": `num_tokens - num_computed_tokens` tokens are still to
    be computed, and a step computes some of them. After a preemption `num_computed_tokens` falls back, the
    tokens themselves stay.
    """

    request: Request
    index: int
    key: float
    """The policy's: the highest runs first. It does not change."""
    token_ids: list[int]
    """Prompt, then what was generated."""
    num_computed_tokens: int = 0
    """Tokens whose keys and values are in the cache."""
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache gave at first admission."""
    block_table: list[int] = field(default_factory=list)
    """The KV blocks of its tokens, in order."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Chained hashes of its full blocks, computed once each."""

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""
        return len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt, which `token_ids` begins with."""
        return len(self.request.prompt_token_ids)

    @property
    def num_generated_tokens(self) -> int:
        """Tokens after the prompt."""
        return len(self.token_ids) - len(self.request.prompt_token_ids)


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """The next `num_tokens` tokens of a sequence, to be computed in this step."""

    sequence: Sequence
    num_tokens: int

    @property
    def is_last_chunk(self) -> bool:
        """Whether this step reaches the sequence's last token, so that one more is sampled."""
        return self.sequence.num_computed_tokens + self.num_tokens == self.sequence.num_tokens


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes. `preempted` sequences gave their blocks back and wait again."""

    scheduled: list[ScheduledSequence]
    preempted: list[Sequence]

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes, over all sequences."""
        return sum(item.num_tokens for item in self.scheduled)
