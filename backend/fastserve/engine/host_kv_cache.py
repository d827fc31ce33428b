"""Host memory for KV blocks that the block pool evicts, and the copies to and from it."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from fastserve.models.kv_cache import KVCaches

COPIED_BLOCKS, COPIES = 32, 3
"""By which the time of a copy is measured, when the engine is loaded: some milliseconds."""


class HostKVCache:
    """Copies of KV blocks, layer by layer: `[num_blocks, block_size, kv_heads, head_dim]` each.

    Pages are taken from the system when they are first written. On a GPU they are pinned, so that copies run
    at the bus's rate.
    """

    def __init__(self, kv_caches: KVCaches, num_blocks: int) -> None:
        """`kv_caches`: those of the device, whose blocks come and go."""
        device_tensors = [tensor for cache in kv_caches for tensor in (cache.keys, cache.values)]
        self.num_blocks = num_blocks
        # Bytes are copied: not every operator knows the dtypes of 8 bits.
        self._device = [tensor.view(torch.uint8) for tensor in device_tensors]
        pin = bool(self._device) and self._device[0].is_cuda and num_blocks > 0
        self._host = [
            torch.empty((num_blocks, *tensor.shape[1:]), dtype=torch.uint8, pin_memory=pin)
            for tensor in self._device
        ]

    @torch.inference_mode()
    def copy(self, copies_out: list[tuple[int, int]], copies_in: list[tuple[int, int]]) -> None:
        """Copies blocks to the host, given as (block, host block), then back, as (host block, block)."""
        if copies_out:
            self._copy(self._device, self._host, copies_out)
        if copies_in:
            self._copy(self._host, self._device, copies_in)

    def measure_copy_seconds(self) -> float:
        """Of one KV block to host memory or back; 0 without such memory. Blocks hold what they held."""
        if not self.num_blocks or not self._device:
            return 0.0
        num_blocks = min(COPIED_BLOCKS, self.num_blocks, len(self._device[0]))
        pairs = [(number, number) for number in range(num_blocks)]
        seconds = []
        for _ in range(1 + COPIES):
            start = time.perf_counter()
            self.copy(pairs, pairs)
            if self._device[0].is_cuda:
                torch.cuda.synchronize(self._device[0].device)
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds[1:]) / (2 * num_blocks)  # the first takes pages from the system

    @staticmethod
    def _copy(sources: list[Tensor], targets: list[Tensor], pairs: list[tuple[int, int]]) -> None:
        source_blocks, target_blocks = torch.tensor(pairs).T
        for source, target in zip(sources, targets, strict=True):
            blocks = source.index_select(0, source_blocks.to(source.device))
            target.index_copy_(0, target_blocks.to(target.device), blocks.to(target.device))
