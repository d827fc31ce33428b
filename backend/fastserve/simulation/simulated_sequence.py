"""Sequences without tokens: scheduling asks of one how long it is, and what its blocks hold."""

from __future__ import annotations

from fastserve.scheduling.sequence import Sequence
from fastserve.types import Request, view_of
from fastserve.workload.arrival import Arrival


def prompt_block_names(arrival: Arrival, block_size: int) -> list[bytes]:
    """Names for the full KV blocks of a prompt, in place of hashes of their tokens.

    Two are equal if the blocks, and all before them, hold the same as far as the workload's block hashes
    say. None where it has none: nobody shares such a prompt.
    """
    names: list[bytes] = []
    if arrival.block_hashes:
        parent = 0
        for start in range(0, arrival.num_prompt_tokens - block_size + 1, block_size):
            first, last = start // arrival.block_size, (start + block_size - 1) // arrival.block_size
            parent = hash((parent, start, *arrival.block_hashes[first : last + 1]))
            names.append(parent.to_bytes(8, "little", signed=True))
    return names


class SimulatedSequence(Sequence):
    """One of which only the length is known, and that of its answer beforehand."""

    __slots__ = (
        "num_generated_tokens",
        "num_output_tokens",
        "num_prompt_tokens",
        "num_tokens",
        "number",
        "prompt_names",
        "replica",
    )

    num_tokens: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_output_tokens: int
    """Tokens that its answer will have."""
    number: int
    """Of its arrival in the workload."""
    prompt_names: list[bytes]
    replica: int
    """Where it was preempted last."""

    def __init__(self, request: Request, number: int, num_output_tokens: int, names: list[bytes]) -> None:
        """`names`: as `prompt_block_names` gives them; empty where blocks of others are not looked for."""
        super().__init__(request, 0, view_of(request), [])
        self.num_prompt_tokens = self.num_tokens = self.view.num_prompt_tokens
        self.num_generated_tokens = 0
        self.num_output_tokens = num_output_tokens
        self.number = number
        self.prompt_names = names

    def append(self, num_tokens: int) -> None:
        """So many tokens were generated."""
        self.num_tokens += num_tokens
        self.num_generated_tokens += num_tokens

    def hash_full_blocks(self, block_size: int) -> None:
        """Names them: those of the prompt by content, the others as its own."""
        hashes, names = self.block_hashes, self.prompt_names
        for number in range(len(hashes), self.num_tokens // block_size):
            own = b"%d/%d" % (self.number, number)
            hashes.append(names[number] if number < len(names) else own)

    def hash_tokens(self, number: int, block_size: int, num_tokens: int) -> bytes:
        """The name of a block of its own that is computed in part."""
        return b"%d/%d+%d" % (self.number, number, num_tokens)
