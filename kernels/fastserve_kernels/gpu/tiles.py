"""Which tile of a product a program has."""

from __future__ import annotations

import triton
import triton.language as tl

GROUP_M = tl.constexpr(16)
"""Neighbouring tiles of tokens that run at the same time, and find each other's weights in the L2 cache."""


@triton.jit
def tile_of(pid, row_tiles, token_tiles):
    """(row tile, token tile): a few token tiles of a row tile, then those of the next; then the next few."""
    group_id = pid // (row_tiles * GROUP_M)
    group_size = tl.minimum(token_tiles - group_id * GROUP_M, GROUP_M)
    in_group = pid - group_id * row_tiles * GROUP_M
    return in_group // group_size, group_id * GROUP_M + in_group % group_size
