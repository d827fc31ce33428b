"""Weights in huge pages, which Linux gives to those who ask for them: with pages of 4 KB a processor waits
for addresses as well as for the memory."""

from __future__ import annotations

import contextlib
import mmap
import threading

import torch
from torch import Tensor

CHUNK_BYTES = 32 << 20
"""Bytes that are asked for at a time: many weights are smaller than a page of 2 MB."""
CACHE_LINE = 64
"""Bytes of a line of the cache."""


class _BumpAllocator:
    """Memory that is cut up from front to back. A chunk is given back with the last tensor in it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rest = torch.empty(0, dtype=torch.uint8)

    def allocate(self, nbytes: int) -> Tensor:
        """That many bytes, at the beginning of a line."""
        whole = -(-nbytes // CACHE_LINE) * CACHE_LINE
        with self._lock:
            if whole > len(self._rest):
                self._rest = _huge_pages(max(CHUNK_BYTES, whole))
            allocated, self._rest = self._rest[:nbytes], self._rest[whole:]
        return allocated


_allocator = _BumpAllocator()


def _huge_pages(nbytes: int) -> Tensor:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # of a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def in_huge_pages(tensor: Tensor) -> Tensor:
    """A contiguous copy."""
    copy = _allocator.allocate(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)
