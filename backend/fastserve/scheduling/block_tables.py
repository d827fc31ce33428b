"""The block tables of sequences: filled from the caches as far as those go, kept findable when preempted."""

from __future__ import annotations

from fastserve.scheduling.block_pool import BlockPool
from fastserve.scheduling.sequence import Sequence, Tail
from fastserve.types import RequestView

RESERVED_TOKENS = 160
"""Room for so many more tokens of each running sequence is left free when another is admitted.

Without it admission fills the cache to its last block, and the next decode preempts the newcomer.
"""


def tokens_to_reserve(view: RequestView, num_tokens: int, tokens_ahead: int = RESERVED_TOKENS) -> int:
    """Of the next tokens of a sequence that has so many, those for which room is left while it runs."""
    left = view.num_prompt_tokens + view.expected_output_tokens - num_tokens
    return max(0, min(left, tokens_ahead))


class CacheTooSmallError(Exception):
    """A sequence needs more blocks than the cache has: it must be removed, for it can never run (again)."""

    def __init__(self, sequence: Sequence, num_blocks_needed: int, num_blocks: int) -> None:
        super().__init__(
            f"sequence {sequence.index} of request {sequence.request.uid} has {sequence.num_tokens} tokens "
            f"and needs {num_blocks_needed} KV blocks; the cache has {num_blocks}"
        )
        self.sequence = sequence


class BlockTables:
    """Fills block tables out of a pool, and says how many blocks a sequence will want."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool

    def fill(self, sequence: Sequence, cached: list[int]) -> None:
        """Gives a sequence its blocks: the cached ones, those that the host has, then empty ones."""
        pool, size = self._pool, self._pool.block_size
        table = list(cached)
        tail, sequence.tail = sequence.tail, None
        hashes = self._findable_hashes(sequence)[len(cached) :]
        for digest in [*hashes, tail.digest] if tail else hashes:
            pool.host.hold(digest)  # what makes room for one must not push out the next
        for digest in hashes:
            if (block := pool.fetch(digest)) is None:
                break
            pool.cache(block, digest)
            table.append(block)
        num_computed_tokens = len(table) * size
        if tail is not None and tail.number == len(table):
            block = pool.take(tail.digest)
            if block is None:
                block = pool.fetch(tail.digest)
            if block is not None:
                table.append(block)
                num_computed_tokens += tail.num_tokens
        sequence.block_table = table + pool.allocate(pool.blocks_for(sequence.num_tokens) - len(table))
        sequence.num_computed_tokens = num_computed_tokens

    def match_prefix(self, sequence: Sequence) -> list[int]:
        """The cached blocks of its prefix, which it uses now; never that of its last token."""
        return self._pool.match_prefix(self._findable_hashes(sequence))

    def _findable_hashes(self, sequence: Sequence) -> list[bytes]:
        """Hashes of the full blocks of its prefix, as far as it may take them from a cache."""
        if not sequence.view.num_served_tokens and not self.uses_cache(sequence):
            return []
        sequence.hash_full_blocks(self._pool.block_size)
        limit = sequence.num_tokens - 1
        if sequence.request.sampling.prompt_logprobs is not None:
            limit = min(limit, sequence.view.num_served_tokens)
        return sequence.block_hashes[: limit // self._pool.block_size]

    def uses_cache(self, sequence: Sequence) -> bool:
        """Whether it may use blocks of others. Prompt logprobs come from computing the whole prompt, once."""
        return self._pool.enable_prefix_caching and sequence.request.sampling.prompt_logprobs is None

    def retain(self, sequence: Sequence) -> None:
        """Lets a sequence that is preempted find what was computed for it."""
        pool, size = self._pool, self._pool.block_size
        sequence.hash_full_blocks(size)
        num_full, num_left = divmod(sequence.num_computed_tokens, size)
        for number in range(num_full):
            pool.cache(sequence.block_table[number], sequence.block_hashes[number])
        if num_left:
            digest = sequence.hash_tokens(num_full, size, num_left)
            pool.cache(sequence.block_table[num_full], digest)
            sequence.tail = Tail(digest, num_full, num_left)

    def reserved_blocks(self, sequence: Sequence, tokens_ahead: int = RESERVED_TOKENS) -> int:
        """Blocks to be kept free for the next tokens of a running sequence."""
        num_tokens = sequence.num_tokens
        num_tokens += tokens_to_reserve(sequence.view, num_tokens, tokens_ahead)
        missing = -(-num_tokens // self._pool.block_size) - len(sequence.block_table)
        return missing if missing > 0 else 0

    def require_capacity(self, sequence: Sequence) -> None:
        """Raises CacheTooSmallError for a sequence that the whole cache cannot hold."""
        needed = self._pool.blocks_for(sequence.num_tokens)
        if needed > self._pool.num_blocks:
            raise CacheTooSmallError(sequence, needed, self._pool.num_blocks)
