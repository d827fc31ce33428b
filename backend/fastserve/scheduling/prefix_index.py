"""Which prompts' KV blocks each engine replica probably holds, as far as the common queue can know."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from fastserve.scheduling.block_pool import ROOT_HASH, hash_block


def block_hashes(token_ids: list[int], block_size: int, root: bytes = ROOT_HASH) -> list[bytes]:
    """Chained hashes of the full blocks of a prompt, as the block pool makes them; `root`: `root_hash`'s."""
    hashes: list[bytes] = []
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = hashes[-1] if hashes else root
        hashes.append(hash_block(parent, token_ids[start : start + block_size]))
    return hashes


class PrefixIndex:
    """The blocks that were sent to one replica, the least recently used forgotten first.

    It holds as many as the replica's cache has blocks. It is a guess: the cache is filled by answers too, and
    evicts in another order. A wrong guess costs time, nothing else.
    """

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._blocks: OrderedDict[bytes, None] = OrderedDict()

    def match(self, hashes: Iterable[bytes]) -> int:
        """How many blocks of the prefix are there."""
        count = 0
        for digest in hashes:
            if digest not in self._blocks:
                break
            count += 1
        return count

    def insert(self, hashes: list[bytes]) -> None:
        """The replica computes these blocks now, or has them. The head of a prefix is forgotten last."""
        for digest in reversed(hashes):
            self._blocks[digest] = None
            self._blocks.move_to_end(digest)
        while len(self._blocks) > self._num_blocks:
            self._blocks.popitem(last=False)
