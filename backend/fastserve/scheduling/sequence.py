"""A sequence: one continuation of one request's prompt, and the plan of a step over several of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from fastserve.scheduling.block_pool import hash_block, root_hash
from fastserve.scheduling.policies.policy import Rank
from fastserve.types import Request, RequestView


@dataclass(frozen=True, slots=True)
class Tail:
    """A block of a preempted sequence whose tokens were computed in part."""

    digest: bytes
    number: int
    """In the block table."""
    num_tokens: int


@dataclass(eq=False, slots=True)
class Sequence:
    """One of the `n` continuations of a request, from admission to its last token.

    There is no "prefill phase" and no "decode phase": `num_tokens - num_computed_tokens` tokens are still to
    be computed, and a step computes some of them. After a preemption `num_computed_tokens` falls back, the
    tokens themselves stay.
    """

    request: Request
    index: int
    view: RequestView
    """What the policy goes by."""
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
    root_hash: bytes = b""
    """The parent of its first block: that of its request's salt, or one of its own where no other sequence
    may find its blocks."""
    tail: Tail | None = None
    """The block that was half computed when it was preempted."""
    rank: Rank = ()
    """The policy's, at the last plan: the lowest runs first."""

    def __post_init__(self) -> None:
        self.root_hash = self.root_hash or root_hash(self.request.cache_salt)

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""
        return len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt, which `token_ids` begins with."""
        return len(self.request.prompt_token_ids)

    def hash_full_blocks(self, block_size: int) -> None:
        """Computes `block_hashes` as far as the tokens go."""
        for number in range(len(self.block_hashes), self.num_tokens // block_size):
            self.block_hashes.append(self.hash_tokens(number, block_size, block_size))

    def hash_tokens(self, number: int, block_size: int, num_tokens: int) -> bytes:
        """The chained hash of the first `num_tokens` of a block whose predecessors have been hashed."""
        parent = self.block_hashes[number - 1] if number else self.root_hash
        start = number * block_size
        return hash_block(parent, self.token_ids[start : start + num_tokens])

    @property
    def num_generated_tokens(self) -> int:
        """Tokens after the prompt."""
        return len(self.token_ids) - len(self.request.prompt_token_ids)


class ScheduledSequence(NamedTuple):
    """The next `num_tokens` tokens of a sequence, to be computed in this step."""

    sequence: Sequence
    num_tokens: int
    proposed: tuple[int, ...] = ()
    """Guesses of the tokens behind its last one, computed along to see which are right (`Speculator`)."""

    @property
    def is_last_chunk(self) -> bool:
        """Whether this step reaches the sequence's last token, so that one more is sampled."""
        return self.sequence.num_computed_tokens + self.num_tokens == self.sequence.num_tokens


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes. `preempted` sequences gave their blocks back and wait again."""

    scheduled: list[ScheduledSequence]
    preempted: list[Sequence]
    copies_out: list[tuple[int, int]] = field(default_factory=list)
    """(KV block, block in host memory): copied before anything else."""
    copies_in: list[tuple[int, int]] = field(default_factory=list)
    """(block in host memory, KV block): copied then, before the step is computed."""

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes, over all sequences, proposed ones among them."""
        return sum(item.num_tokens + len(item.proposed) for item in self.scheduled)

    @property
    def num_prompt_tokens(self) -> int:
        """Those that are no decodes: of prompts, and of sequences that are computed again."""
        return sum(
            item.num_tokens
            for item in self.scheduled
            if item.sequence.num_tokens - item.sequence.num_computed_tokens > 1
        )
