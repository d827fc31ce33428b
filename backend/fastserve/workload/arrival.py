"""One request of a workload, without its text."""

from __future__ import annotations

from msgspec import Struct


class Arrival(Struct, frozen=True, gc=False):
    """When a request arrives and how long it is. Workloads are lists of these, in order of time.

    `gc=False`: it holds nothing that could refer back to it, and a workload may have millions.
    """

    time: float
    """Seconds from the start of the workload."""
    num_prompt_tokens: int
    num_output_tokens: int
    """Tokens that the answer will have; a scheduler that is not clairvoyant must not look."""
    priority: int = 0
    """Higher is more urgent."""
    tenant: str = ""
    block_hashes: tuple[int, ...] = ()
    """Names of the prompt's blocks by content, the last one perhaps not full; empty if none are known.

    Requests whose hashes begin alike have prompts that begin alike.
    """
    block_size: int = 0
    """Tokens in a block of `block_hashes`; 0 where there are none."""
