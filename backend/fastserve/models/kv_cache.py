"""The paged cache of keys and values, in the model's dtype or in 8 bits."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from fastserve.checkpoints.kv_cache_scheme import KVCacheShapes, KVScales
from fastserve_kernels.formats import LARGEST_FP8
from fastserve_kernels.kv_cache import KVCache

KV_CACHE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""The quantized dtypes that `--kv-cache-dtype` names."""
QUANTIZED_MAX = {torch.int8: 127.0, torch.float8_e4m3fn: LARGEST_FP8}
"""The largest magnitude that a cache of 8 bits holds, before its scale."""

DEFAULT_CPU_CACHE_BYTES = 1 << 30
GPU_MEMORY_SHARE = 0.9
"""The share of a GPU's memory that model and cache may fill; the rest is for activations."""
KVCaches = list[KVCache]
"""The caches of a model, one per layer."""


def default_cache_bytes(device: torch.device, num_sharing: int) -> int:
    """For a cache of which the operator gives no size: 1 GiB on a CPU, most of what is free on a GPU.

    `num_sharing`: replicas that share the GPU.
    """
    if device.type != "cuda":
        return DEFAULT_CPU_CACHE_BYTES
    free, total = torch.cuda.mem_get_info(device)
    left = free - int(total * (1 - GPU_MEMORY_SHARE))
    if num_sharing > 1:  # the others may not have taken theirs yet
        left = min(left, int(total * GPU_MEMORY_SHARE / num_sharing) - torch.cuda.memory_allocated(device))
    return max(0, left)


def num_elements(shapes: KVCacheShapes) -> int:
    """The number of elements of all layers' keys and values together."""
    return sum(prod(shape) for layer in shapes for shape in layer)


def make_kv_caches(
    shapes: KVCacheShapes,
    dtype: torch.dtype,
    device: torch.device | str,
    scales: list[KVScales] | None = None,
) -> KVCaches:
    """Caches of zeros of these shapes. `scales`: those of each layer, for a dtype of 8 bits."""

    def zeros(shape: tuple[int, ...]) -> Tensor:
        # Written over, so that the process has its memory from the start and a request never waits for the
        # kernel to find pages: torch.zeros takes pages that come when they are touched.
        return torch.empty(shape, dtype=dtype, device=device).zero_()

    caches = [(zeros(keys), zeros(values)) for keys, values in shapes]
    if scales is None:
        return [KVCache(*cache) for cache in caches]
    return [
        KVCache(*cache, layer.k.to(device), layer.v.to(device))
        for cache, layer in zip(caches, scales, strict=True)
    ]
