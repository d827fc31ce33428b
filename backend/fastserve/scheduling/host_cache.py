"""KV blocks in host memory: what the block pool evicts goes there, and comes back when it is looked for."""

from __future__ import annotations

from collections import OrderedDict


class HostCache:
    """Block ids 0 .. num_blocks - 1 of a second, slower tier, by the hash of their content; LRU.

    It decides only what is where: `copies_out` and `copies_in` say what has to be copied before the step that
    is being planned is computed, the former first. What came in is not overwritten before it has been copied.
    """

    def __init__(self, num_blocks: int) -> None:
        """0: nothing is kept."""
        self.num_blocks = num_blocks
        self.copies_out: list[tuple[int, int]] = []
        """(block of the pool, block here)"""
        self.copies_in: list[tuple[int, int]] = []
        """(block here, block of the pool)"""
        self._free = list(range(num_blocks - 1, -1, -1))
        self._blocks: OrderedDict[bytes, int] = OrderedDict()
        """By hash, the least recently used first."""
        self._held: set[bytes] = set()
        """What this step copies in."""

    def __contains__(self, digest: object) -> bool:
        """Whether the block of that hash is here."""
        return digest in self._blocks

    @property
    def num_used(self) -> int:
        """Blocks that hold something."""
        return len(self._blocks)

    def begin_step(self) -> None:
        """The copies of the last plan have been made."""
        self.copies_out, self.copies_in = [], []
        self._held.clear()

    def hold(self, digest: bytes) -> bool:
        """Whether the block of that hash is here; if so, it stays until the next step's plan."""
        if digest not in self._blocks:
            return False
        self._held.add(digest)
        self._blocks.move_to_end(digest)
        return True

    def put(self, digest: bytes, block: int) -> None:
        """Keeps the content of a block of the pool, which is about to be used for something else."""
        if digest in self._blocks:
            self._blocks.move_to_end(digest)
            return
        if not self._free and not self._evict():
            return
        self._blocks[digest] = self._free.pop()
        self.copies_out.append((block, self._blocks[digest]))

    def get(self, digest: bytes, block: int) -> None:
        """Brings the content back into a block of the pool. It stays here too: the next eviction is free.

        Allocating `block` may evict what is not held. Raises KeyError if it is not here.
        """
        self.copies_in.append((self._blocks[digest], block))
        self.hold(digest)

    def _evict(self) -> bool:
        """Frees the least recently used block; False if all are held."""
        for digest, block in self._blocks.items():
            if digest not in self._held:
                del self._blocks[digest]
                self._free.append(block)
                return True
        return False
