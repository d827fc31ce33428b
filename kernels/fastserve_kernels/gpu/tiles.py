"""Which tile of a product a program has."""

from __future__ import annotations

import triton
import triton.language as tl

TOGETHER = tl.constexpr(16)
"""Neighbouring tiles of tokens that run at the same time, and find each other's weights in the L2 cache."""


@triton.jit
def tile_of(program, row_tiles, token_tiles):
    """(row tile, token tile): a few token tiles of a row tile, then those of the next; then the next few."""
    band = program // (row_tiles * TOGETHER)
    width = tl.minimum(token_tiles - band * TOGETHER, TOGETHER)
    within = program - band * row_tiles * TOGETHER
    return within // width, band * TOGETHER + within % width
