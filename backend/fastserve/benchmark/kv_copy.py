"""How fast KV blocks are copied out of the cache and into it."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from fastserve.models.kv_cache import KVCaches

COPIED_TOKENS = 512
"""Of the sequence whose blocks are copied."""
REPEATS = 9


def kv_bytes_per_token(kv_caches: KVCaches) -> int:
    """Bytes of a token's keys and values in all layers."""
    return sum(tensor[0, 0].nbytes for tensor in _tensors(kv_caches))


def kv_copy_rate(kv_caches: KVCaches) -> float:
    """Bytes a second, for the blocks of a sequence copied to host memory and for as many copied back.

    The blocks lie anywhere in the cache, as those of a sequence do. They hold afterwards what they held.
    """
    tensors = _tensors(kv_caches)
    num_blocks, block_size = tensors[0].shape[:2]
    blocks = torch.randperm(num_blocks)[: -(-COPIED_TOKENS // block_size)].to(tensors[0].device)
    host = [torch.empty((len(blocks), *tensor.shape[1:]), dtype=torch.uint8) for tensor in tensors]
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for tensor, copy in zip(tensors, host, strict=True):
            _gather(tensor, blocks, copy)
        for tensor, copy in zip(tensors, host, strict=True):
            tensor[blocks] = copy.to(tensor.device)
        if tensors[0].is_cuda:
            torch.cuda.synchronize(tensors[0].device)
        seconds.append(time.perf_counter() - start)
    return 2 * sum(copy.nbytes for copy in host) / statistics.median(seconds)


def _gather(tensor: Tensor, blocks: Tensor, out: Tensor) -> None:
    """Where cache and copy are in one memory, the blocks are copied once."""
    if tensor.device == out.device:
        torch.index_select(tensor, 0, blocks, out=out)
    else:
        out.copy_(tensor[blocks])


def _tensors(kv_caches: KVCaches) -> list[Tensor]:
    """Keys and values of all layers as bytes: not every dtype of 8 bits can be gathered."""
    return [tensor.view(torch.uint8) for cache in kv_caches for tensor in (cache.keys, cache.values)]
