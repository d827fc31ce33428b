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

MOST_TILES = 1 << 14
"""Of a product whose programs share K."""
LOADED_TOGETHER = tl.constexpr(8 * 1024)
"""Sums that a program has on their way at once: as many as registers hold."""


@functools.cache
def arrivals(device: torch.device) -> Tensor:
    """The counts [MOST_TILES] int32 of a device, all 0 between launches; made at the first call.

    Raises RuntimeError if that is in the capture of a CUDA graph, which would set them to 0 only when it
    runs.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a product whose programs share K was never run before a CUDA graph was captured")
    with torch.inference_mode(False):
        return torch.zeros(MOST_TILES, dtype=torch.int32, device=device)


def partial_sums(splits: int, tokens: int, out_features: int, device: torch.device) -> Tensor | None:
    """Room for the sums of that many programs; None if there is but one for each tile."""
    return (
        torch.empty(splits, tokens, out_features, dtype=torch.float32, device=device) if splits > 1 else None
    )


@triton.jit
def store_sums(
    sums, y, bias, residual, partial, arrivals, row, token, out_features, tokens, residual_row, tile, split,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Ends the tile of sums [rows of W, tokens] float32; y [tokens, out_features] is contiguous."""
    inside = (row[:, None] < out_features) & (token[None, :] < tokens)
    place = token.to(tl.int64)[None, :] * out_features + row[:, None]
    if SPLITS == 1:
        _store(sums, y, bias, residual, place, inside, row, token, out_features, residual_row)
    else:
        LOADS: tl.constexpr = LOADED_TOGETHER // (sums.shape[0] * sums.shape[1])
        TOGETHER: tl.constexpr = SPLITS if LOADS >= SPLITS else (LOADS if LOADS else 1)
        size = tokens.to(tl.int64) * out_features
        tl.store(partial + split * size + place, sums, mask=inside)
        tl.debug_barrier()
        before = tl.atomic_add(arrivals + tile, 1, sem="acq_rel")
        if before == SPLITS - 1:
            total = tl.zeros_like(sums)
            for first in range(0, SPLITS, TOGETHER):
                for i in tl.static_range(TOGETHER):
                    other = partial + (first + i) * size + place
                    total += tl.load(other, mask=inside, other=0.0, cache_modifier=".cg")
            _store(total, y, bias, residual, place, inside, row, token, out_features, residual_row)
            tl.store(arrivals + tile, 0)


@triton.jit
def _store(sums, y, bias, residual, place, inside, row, token, out_features, residual_row):
    if bias is not None:
        sums += tl.load(bias + row, mask=row < out_features, other=0.0).to(tl.float32)[:, None]
    if residual is not None:
        added = residual + token.to(tl.int64)[None, :] * residual_row + row[:, None]
        sums += tl.load(added, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, rounded(sums, y.dtype.element_ty), mask=inside)
