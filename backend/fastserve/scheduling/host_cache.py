"""KV blocks in host memory: what the block pool evicts goes there, and comes back when it is looked for."""

from __future__ import annotations

from collections import OrderedDict


class HostCache:
    """Block ids 0 .. num_blocks - 1 of a second, slower tier, by the hash of their content; LRU.

    It decides only what is where: `copies_out` and `copies_in` say what has to be copied before the step that
    is being planned is computed, the former first. No block is written twice, and what is to be copied in is
    not overwritten before. For the copies of a plan it is enough to remember the last to each block: blocks
    change hands more than once where a plan preempts what it has admitted.
    """

    def __init__(self, num_blocks: int) -> None:
        """0: nothing is kept."""
        self.num_blocks = num_blocks
        self.copy_seconds = 0.0
        """Measured, of one block in one direction; 0: not known."""
        self.recompute_seconds = 0.0
        """Measured, of computing the tokens of one block; 0: not known."""
        self._out: dict[int, int] = {}
        """Block here, block of the pool."""
        self._in: dict[int, int] = {}
        """Block of the pool, block here."""
        self._held: set[int] = set()
        """Blocks that are read before the step."""
        self._free = list(range(num_blocks - 1, -1, -1))
        self._blocks: OrderedDict[bytes, int] = OrderedDict()
        """By hash, the least recently used first."""

    def __contains__(self, digest: object) -> bool:
        """Whether the block of that hash is here."""
        return digest in self._blocks

    @property
    def num_used(self) -> int:
        """Blocks that hold something."""
        return len(self._blocks)

    @property
    def copies_out(self) -> list[tuple[int, int]]:
        """(block of the pool, block here)"""
        return [(block, here) for here, block in self._out.items()]

    @property
    def copies_in(self) -> list[tuple[int, int]]:
        """(block here, block of the pool)"""
        return [(here, block) for block, here in self._in.items()]

    def begin_step(self) -> None:
        """The copies of the last plan have been made."""
        self._out, self._in, self._held = {}, {}, set()

    def put(self, digest: bytes, block: int) -> None:
        """Keeps the content of a block of the pool, which is about to be used for something else.

        Not if the tokens are computed again in less time than it takes to copy them out and back.
        """
        if digest in self._blocks:
            self._blocks.move_to_end(digest)
            return
        if 0.0 < self.recompute_seconds < 2 * self.copy_seconds:
            return
        if not self._free and not self._evict():
            return
        here = self._blocks[digest] = self._free.pop()
        self._out[here] = block

    def hold(self, digest: bytes) -> int | None:
        """The block of that hash, which stays until the next step; None if it is not here."""
        here = self._blocks.get(digest)
        if here is not None:
            self._held.add(here)
            self._blocks.move_to_end(digest)
        return here

    def copy_in(self, here: int, block: int) -> None:
        """Brings what a held block has back into a block of the pool. It stays here too: its next eviction
        costs nothing."""
        self._in[block] = here

    def _evict(self) -> bool:
        """Frees the least recently used block; False if all that are left are held."""
        for digest, here in self._blocks.items():
            if here not in self._held:
                del self._blocks[digest]
                self._free.append(here)
                return True
        return False
