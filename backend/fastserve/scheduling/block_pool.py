"""The blocks of the KV cache: which are used, and which still hold a prefix worth finding again.

A block is used or free, and cached or not:

    used     by one sequence or, as part of a common prefix, by several: its reference count is above 0
    free     by nobody
    cached   computed, and not to change: it can be found by the hash of its content, used or free

Blocks that are free and not cached are given out first, then free cached ones, the least recently used first.

The blocks of a preempted sequence are cached too, its last, half-filled one included: unless they are evicted
meanwhile, it computes nothing again. It will want them for certain, so they are retained: they are evicted
after all others, and to the host cache if there is one.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from fastserve.scheduling.host_cache import HostCache

ROOT_HASH = bytes(16)
"""The parent of a sequence's first block, where nothing keeps it apart."""


class OutOfBlocksError(Exception):
    """More blocks were asked for than are free."""


class BlockPoolError(Exception):
    """The pool's books do not balance: there is a bug in it or in who uses it."""


def hash_block(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The 16-byte BLAKE2b hash of a block's tokens and of all that comes before them.

    `parent`: the hash of the block before it, ROOT_HASH for the first. The hash is a cryptographic one
    because a client chooses the tokens: with collisions it could read from other clients' prompts.
    """
    return blake2b(parent + struct.pack(f"<{len(token_ids)}q", *token_ids), digest_size=16).digest()


def root_hash(cache_salt: str) -> bytes:
    """The parent of the first block of requests with that salt: they share blocks with one another only."""
    return blake2b(cache_salt.encode(), digest_size=16, person=b"salt").digest() if cache_salt else ROOT_HASH


def private_root_hash(uid: str, index: int) -> bytes:
    """A parent for the first block of a sequence that shares its blocks with nobody."""
    return blake2b(f"{index} {uid}".encode(), digest_size=16).digest()


class BlockPool:
    """Reference-counted block ids 0 .. num_blocks - 1. Every operation is O(1) per block.

    With `enable_prefix_caching` sequences share blocks of equal prefixes; without, each finds only its own.
    """

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool, num_host_blocks: int = 0
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        """Tokens."""
        self.enable_prefix_caching = enable_prefix_caching
        self.host = HostCache(num_host_blocks)
        self._ref_counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        """By block, the hash that it is cached under."""
        self._cached: dict[bytes, int] = {}
        """The cached blocks by hash, used or free."""
        self._free = list(range(num_blocks - 1, -1, -1))
        """Free blocks that are not cached."""
        self._free_cached: OrderedDict[int, None] = OrderedDict()
        """Free blocks that are cached, the next to be evicted first."""
        self._free_retained: OrderedDict[int, None] = OrderedDict()
        """The same, of preempted sequences."""

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated, cached ones included."""
        return len(self._free) + len(self._free_cached) + len(self._free_retained)

    @property
    def num_unretained(self) -> int:
        """Blocks that can be allocated without evicting one of a preempted sequence."""
        return len(self._free) + len(self._free_cached)

    @property
    def num_used(self) -> int:
        """Blocks that are in a block table."""
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks so many tokens take."""
        return -(-num_tokens // self.block_size)

    def ref_count(self, block: int) -> int:
        """How many block tables hold `block`."""
        return self._ref_counts[block]

    def allocate(self, count: int) -> list[int]:
        """`count` blocks, each used once now. Raises OutOfBlocksError, and takes none, if fewer are free."""
        if count > self.num_free:
            raise OutOfBlocksError(f"{count} KV blocks were asked for; {self.num_free} are free")
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._ref_counts[block] = 1
        return blocks

    def _evict(self) -> int:
        is_retained = not self._free_cached
        block, _ = (self._free_retained if is_retained else self._free_cached).popitem(last=False)
        digest = self._hashes[block]
        assert digest is not None
        if is_retained:
            self.host.put(digest, block)
        del self._cached[digest]
        self._hashes[block] = None
        return block

    def free(self, block_table: Sequence[int], retain: bool = False) -> None:
        """Drops one reference to each block of a sequence; `retain`: which will come back for them.

        The last block goes first: a sequence's tail is evicted before its head, without which the tail could
        not be found. Raises BlockPoolError for a block that is free already.
        """
        for block in reversed(block_table):
            if self._ref_counts[block] == 0:
                raise BlockPoolError(f"KV block {block} was freed, but it is free already")
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                if self._hashes[block] is None:
                    self._free.append(block)
                else:
                    (self._free_retained if retain else self._free_cached)[block] = None

    def match_prefix(self, hashes: Iterable[bytes]) -> list[int]:
        """The cached blocks of the longest prefix of `hashes`, each with one more reference now."""
        blocks = []
        for digest in hashes:
            block = self._cached.get(digest)
            if block is None:
                break
            if self._ref_counts[block] == 0:
                self._use_again(block)
            self._ref_counts[block] += 1
            blocks.append(block)
        return blocks

    def take(self, digest: bytes) -> int | None:
        """A cached block that nobody uses, to be written to: it is used now, and no longer cached.

        None if there is none.
        """
        block = self._cached.get(digest)
        if block is None or self._ref_counts[block]:
            return None
        self._use_again(block)
        del self._cached[digest]
        self._hashes[block] = None
        self._ref_counts[block] = 1
        return block

    def _use_again(self, block: int) -> None:
        del (self._free_retained if block in self._free_retained else self._free_cached)[block]

    def fetch(self, digest: bytes) -> int | None:
        """A used block that gets the host's copy of that content before the step; None if the host has none.

        Raises OutOfBlocksError if no block is free.
        """
        here = self.host.hold(digest)  # before the allocation, whose eviction could push it out
        if here is None:
            return None
        [block] = self.allocate(1)
        self.host.copy_in(here, block)
        return block

    def cache(self, block: int, digest: bytes) -> None:
        """Lets a used block, whose content is computed and will not change, be found by its hash.

        Where another block with this content is cached already, that one stays the one that is found.
        """
        if digest not in self._cached and self._hashes[block] is None:
            self._cached[digest] = block
            self._hashes[block] = digest

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raises BlockPoolError unless the books balance and the block `tables` are all that use blocks."""
        counts = Counter(block for table in tables for block in table)
        wrong = [block for block, count in enumerate(self._ref_counts) if counts[block] != count]
        if wrong:
            raise BlockPoolError(
                f"the reference counts of KV blocks {wrong} differ from the tables that use them"
            )
        free = sorted([*self._free, *self._free_cached, *self._free_retained])
        if free != [block for block, count in enumerate(self._ref_counts) if count == 0]:
            raise BlockPoolError("the free KV blocks are not those that no table uses")
        if any(self._hashes[block] is not None for block in self._free):
            raise BlockPoolError("a KV block that counts as not cached has a hash")
        if any(self._hashes[block] is None for block in (*self._free_cached, *self._free_retained)):
            raise BlockPoolError("a KV block that counts as cached has no hash")
        hashes = {digest: block for block, digest in enumerate(self._hashes) if digest is not None}
        if hashes != self._cached:
            raise BlockPoolError("KV blocks and the hashes they are cached under do not agree")
