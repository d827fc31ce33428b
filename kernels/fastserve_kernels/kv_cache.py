"""A layer's paged cache of keys and values."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class KVCache(NamedTuple):
    """The keys and values of a layer, in blocks that sequences share out among themselves."""

    keys: Tensor
    """[blocks, block_size, Hk, D] in the activations' dtype, or int8 or float8_e4m3fn."""
    values: Tensor
    """[blocks, block_size, Hk, Dv] of the same dtype."""
    k_scale: Tensor | None = None
    """[Hk] float32, by which keys of 8 bits are to be multiplied; None for others."""
    v_scale: Tensor | None = None
    """[Hk] float32, by which values of 8 bits are to be multiplied; None for others."""
