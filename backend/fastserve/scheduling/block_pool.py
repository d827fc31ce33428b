"""The blocks of the KV cache: who holds which, and which still hold a prefix worth finding again.

A block is in exactly one of three places:

    held        by one sequence or, as part of a common prefix, by several: its reference count is above 0
    evictable   held by nobody, but published: its content can be found by its hash, until it is evicted
    blank       held by nobody, with nothing in it that could be found

Evictable and blank blocks are free. Blank ones are given out first, then evictable ones, the least recently
held first.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

ROOT_HASH = bytes(16)
"""The parent of a sequence's first block."""


class OutOfBlocksError(Exception):
    """More blocks were asked for than are free."""


class BlockPoolError(Exception):
    """The pool's books do not balance: there is a bug in it or in who uses it."""


def hash_block(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The 16-byte BLAKE2b hash of a full block and of all that comes before it.

    `parent`: the hash of the block before it, ROOT_HASH for the first. The hash is a cryptographic one
    because a client chooses the tokens: with collisions it could read from other clients' prompts.
    """
    return blake2b(parent + struct.pack(f"<{len(token_ids)}q", *token_ids), digest_size=16).digest()


class BlockPool:
    """Reference-counted block ids 0 .. num_blocks - 1. Every operation is O(1) per block.

    Without prefix caching nothing is ever published, so nothing is ever matched.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        """Tokens."""
        self.enable_prefix_caching = enable_prefix_caching
        self._ref_counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        """What a block is published under."""
        self._published: dict[bytes, int] = {}
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()
        """The next to be evicted first."""

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._evictable)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks so many tokens take."""
        return -(-num_tokens // self.block_size)

    def ref_count(self, block: int) -> int:
        """How many block tables hold `block`."""
        return self._ref_counts[block]

    def allocate(self, count: int) -> list[int]:
        """`count` blocks, each held once now. Raises OutOfBlocksError, and takes none, if fewer are free."""
        if count > self.num_free:
            raise OutOfBlocksError(f"{count} KV blocks were asked for; {self.num_free} are free")
        blocks = [self._blank.pop() if self._blank else self._evict() for _ in range(count)]
        for block in blocks:
            self._ref_counts[block] = 1
        return blocks

    def _evict(self) -> int:
        block, _ = self._evictable.popitem(last=False)
        digest = self._hashes[block]
        assert digest is not None
        del self._published[digest]
        self._hashes[block] = None
        return block

    def release(self, table: Sequence[int]) -> None:
        """Gives up one hold on each block of a sequence.

        The last block goes first: of what becomes evictable, a sequence's tail is evicted before its head,
        without which the tail could not be found. Raises BlockPoolError for a block that nobody holds.
        """
        for block in reversed(table):
            if self._ref_counts[block] == 0:
                raise BlockPoolError(f"KV block {block} was released, but nobody holds it")
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                if self._hashes[block] is None:
                    self._blank.append(block)
                else:
                    self._evictable[block] = None

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The published blocks of the longest prefix of `hashes` that is cached, each held once more now."""
        blocks = []
        for digest in hashes:
            block = self._published.get(digest)
            if block is None:
                break
            if self._ref_counts[block] == 0:
                del self._evictable[block]
            self._ref_counts[block] += 1
            blocks.append(block)
        return blocks

    def publish(self, block: int, digest: bytes) -> None:
        """Lets a held block, full and computed, be found by its hash.

        Where another block with this content is published already, that one stays the one that is found.
        """
        if self.enable_prefix_caching and digest not in self._published:
            self._published[digest] = block
            self._hashes[block] = digest

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raises BlockPoolError unless the books balance and `tables` are exactly what is held."""
        holds = [0] * self.num_blocks
        for table in tables:
            for block in table:
                holds[block] += 1
        if holds != self._ref_counts:
            wrong = [block for block in range(self.num_blocks) if holds[block] != self._ref_counts[block]]
            raise BlockPoolError(
                f"the reference counts of KV blocks {wrong} differ from the tables that hold them"
            )
        free = sorted([*self._blank, *self._evictable])
        if free != [block for block in range(self.num_blocks) if holds[block] == 0]:
            raise BlockPoolError("the free KV blocks are not those that nobody holds")
        if any(self._hashes[block] is not None for block in self._blank):
            raise BlockPoolError("a blank KV block is published")
        if any(self._hashes[block] is None for block in self._evictable):
            raise BlockPoolError("an evictable KV block is not published")
        if {
            digest: block for block, digest in enumerate(self._hashes) if digest is not None
        } != self._published:
            raise BlockPoolError("KV blocks and the hashes they are published under do not agree")
