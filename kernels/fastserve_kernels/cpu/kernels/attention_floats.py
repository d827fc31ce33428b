"""The products of paged attention in float32: keys and values are converted once for all rows of a tile."""

from __future__ import annotations

from numba import float32, njit

from fastserve_kernels.cpu.kernels.attention_scratch import (
    Cache,
    Scratch,
    load_rows,
    prefetch_head,
    store_rows,
)
from fastserve_kernels.cpu.kernels.attention_tiles import BLOCK_N, AttentionShape, Tile, kv_tile_len
from fastserve_kernels.cpu.kernels.vectors import (
    LANES,
    WIDE,
    at,
    load,
    load_masked,
    multiply_add,
    reduce_add,
    splat,
    store,
    store_transposed,
)


@njit(error_model="numpy")
def load_kv_tile(tile: Tile, shape: AttentionShape, scratch: Scratch, cache: Cache, base: int) -> None:
    """The keys of the kv tile that begins at base, transposed, and its values.

    The lanes of keys that the tile does not see hold others or what was there before.
    """
    count = kv_tile_len(tile, base)
    for j in range(count):
        start = scratch.starts[j] * shape.dim_v
        for i in range(0, shape.wide_dim_v, LANES):
            value = load_masked(cache.values, start + i, shape.dim_v - i)
            store(scratch.values, j * shape.wide_dim_v + i, value)
    for first in range(0, count, LANES):
        starts = at(scratch.starts, first)
        for i in range(0, shape.dim - LANES + 1, LANES):
            store_transposed(at(cache.keys, i), starts, shape.dim, scratch.keys, i * BLOCK_N + first, BLOCK_N)
        for i in range(shape.dim // LANES * LANES, shape.dim):
            for j in range(LANES):
                scratch.keys[i * BLOCK_N + first + j] = reduce_add(
                    load(cache.keys, starts[j] * shape.dim + i, 1)
                )


@njit(error_model="numpy")
def multiply_keys(shape: AttentionShape, scratch: Scratch, cache: Cache, row: int) -> None:
    """The scores of ROWS rows with all keys of the kv tile. The first rows bring the keys of the next, those
    of fewer dimensions than the kv tile has keys a part of them."""
    first = row * shape.wide_dim
    second, third, fourth = first + shape.wide_dim, first + 2 * shape.wide_dim, first + 3 * shape.wide_dim
    for lane in range(0, BLOCK_N, WIDE):
        a = b = c = d = splat(float32(0), WIDE)
        for i in range(shape.dim):
            if row + lane == 0:
                prefetch_head(cache.keys, scratch.next_starts[i % BLOCK_N] * shape.dim, shape.dim)
            key = load(scratch.keys, i * BLOCK_N + lane, WIDE)
            a = multiply_add(splat(scratch.queries[first + i], WIDE), key, a)
            b = multiply_add(splat(scratch.queries[second + i], WIDE), key, b)
            c = multiply_add(splat(scratch.queries[third + i], WIDE), key, c)
            d = multiply_add(splat(scratch.queries[fourth + i], WIDE), key, d)
        store_rows(scratch.p, row * BLOCK_N + lane, BLOCK_N, a, b, c, d)


@njit(error_model="numpy")
def multiply_values(shape: AttentionShape, scratch: Scratch, cache: Cache, row: int, count: int) -> None:
    """Adds the kv tile's first values, weighted, to the results of ROWS rows. The first rows bring the values
    of the next."""
    if row == 0:
        for j in range(count, BLOCK_N):
            prefetch_head(cache.values, scratch.next_starts[j] * shape.dim_v, shape.dim_v)
    for i in range(0, shape.wide_dim_v, WIDE):
        first = row * shape.wide_dim_v + i
        a, b, c, d = load_rows(scratch.acc, first, shape.wide_dim_v)
        for j in range(count):
            if row + i == 0:
                prefetch_head(cache.values, scratch.next_starts[j] * shape.dim_v, shape.dim_v)
            value = load(scratch.values, j * shape.wide_dim_v + i, WIDE)
            weight = row * BLOCK_N + j
            a = multiply_add(splat(scratch.p[weight], WIDE), value, a)
            b = multiply_add(splat(scratch.p[weight + BLOCK_N], WIDE), value, b)
            c = multiply_add(splat(scratch.p[weight + 2 * BLOCK_N], WIDE), value, c)
            d = multiply_add(splat(scratch.p[weight + 3 * BLOCK_N], WIDE), value, d)
        store_rows(scratch.acc, first, shape.wide_dim_v, a, b, c, d)
