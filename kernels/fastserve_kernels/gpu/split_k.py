"""The end of a matrix product: the sums of programs that share K added up, then bias and residual, and
stored.

Programs that share K write their sums to `partial`, float32, and count themselves at their tile. The one that
finds all others counted adds the sums up in the programs' order, so that the result does not depend on which
came last, and sets the count to 0 for the next launch. That costs no launch of its own; but two products must
not run at the same time on one device, as they would count at the same places: run all in one stream.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastserve_kernels.gpu.arithmetic import rounded

MAX_TILES = 1 << 14
"""Tiles of a product whose programs share K, at most."""
LOADED_TOGETHER = tl.constexpr(8 * 1024)
"""Sums that a program has on their way at once: as many as registers hold."""


@functools.cache
def arrivals(device: torch.device) -> Tensor:
    """The counts [MAX_TILES] int32 of a device, all 0 between launches; made at the first call.

    Raises RuntimeError if that is in the capture of a CUDA graph, which would set them to 0 only when it
    runs.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a product whose programs share K was never run before a CUDA graph was captured")
    with torch.inference_mode(False):
        return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


def partial_sums(splits: int, tokens: int, out_features: int, device: torch.device) -> Tensor | None:
    """Room for the sums of that many programs; None if there is but one for each tile."""
    return (
        torch.empty(splits, tokens, out_features, dtype=torch.float32, device=device) if splits > 1 else None
    )


@triton.jit
def store_sums(
    acc, y, bias, residual, partial, arrivals, offs_n, offs_m, out_features, tokens, residual_row, tile,
    split, SPLITS: tl.constexpr,
):  # fmt: skip
    """Stores the accumulators [rows of W, tokens] float32 of a tile to y [tokens, out_features] contiguous.

    With SPLITS > 1 the last program of a tile to arrive adds up the partial sums of all, in order.
    """
    mask = (offs_n[:, None] < out_features) & (offs_m[None, :] < tokens)
    offs = offs_m.to(tl.int64)[None, :] * out_features + offs_n[:, None]
    if SPLITS == 1:
        _store(acc, y, bias, residual, offs, mask, offs_n, offs_m, out_features, residual_row)
    else:
        LOADS: tl.constexpr = LOADED_TOGETHER // (acc.shape[0] * acc.shape[1])
        TOGETHER: tl.constexpr = SPLITS if LOADS >= SPLITS else (LOADS if LOADS else 1)
        size = tokens.to(tl.int64) * out_features
        tl.store(partial + split * size + offs, acc, mask=mask)
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals + tile, 1, sem="acq_rel")
        if arrived == SPLITS - 1:
            total = tl.zeros_like(acc)
            for first in range(0, SPLITS, TOGETHER):
                for i in tl.static_range(TOGETHER):
                    other = partial + (first + i) * size + offs
                    total += tl.load(other, mask=mask, other=0.0, cache_modifier=".cg")
            _store(total, y, bias, residual, offs, mask, offs_n, offs_m, out_features, residual_row)
            tl.store(arrivals + tile, 0)


@triton.jit
def _store(acc, y, bias, residual, offs, mask, offs_n, offs_m, out_features, residual_row):
    if bias is not None:
        acc += tl.load(bias + offs_n, mask=offs_n < out_features, other=0.0).to(tl.float32)[:, None]
    if residual is not None:
        residual_ptrs = residual + offs_m.to(tl.int64)[None, :] * residual_row + offs_n[:, None]
        acc += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + offs, rounded(acc, y.dtype.element_ty), mask=mask)
