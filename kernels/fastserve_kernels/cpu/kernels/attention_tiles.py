"""How paged attention is divided: a batch into tiles of queries, and the keys that these see into kv
tiles."""

from __future__ import annotations

from typing import NamedTuple

from numba import njit

from fastserve_kernels.cpu.kernels.kernel import Integers
from fastserve_kernels.cpu.kernels.vectors import at

BLOCK_N = 64
"""Keys of a kv tile: between two updates of the softmax."""


class AttentionShape(NamedTuple):
    """What is the same for all work items."""

    heads: int
    kv_heads: int
    group: int
    """Query heads of a key head."""
    dim: int
    dim_v: int
    wide_dim: int
    """dim in whole LANES."""
    wide_dim_v: int
    """dim_v in whole WIDE."""
    block_size: int
    q_stride: int
    window: int
    scale: float
    softcap: float


class Batch(NamedTuple):
    """The sequences, as `AttentionMetadata` describes them."""

    query_start: Integers
    context_lens: Integers
    block_tables: Integers
    sequences: int
    table_width: int
    tile_len: int
    """Queries of a tile, at most."""


class Tile(NamedTuple):
    """Queries that follow each other, and the key head that they are to meet."""

    token: int
    """Where the first lies in the batch."""
    position: int
    """Where it stands in its sequence."""
    queries: int
    kv_head: int
    table: Integers
    """The sequence's blocks."""


@njit(error_model="numpy")
def tile_of(batch: Batch, shape: AttentionShape, item: int) -> Tile:
    """The tile that is a certain work item of the batch; beyond the last, one of no queries."""
    number, kv_head = item // shape.kv_heads, item % shape.kv_heads
    for i in range(batch.sequences):
        start, end = batch.query_start[i], batch.query_start[i + 1]
        tiles = (end - start + batch.tile_len - 1) // batch.tile_len
        if number < tiles:
            # The last queries see the most keys: the longest work comes first.
            before = (tiles - 1 - number) * batch.tile_len
            position = batch.context_lens[i] - (end - start) + before
            table = at(batch.block_tables, i * batch.table_width)
            return Tile(start + before, position, min(batch.tile_len, end - start - before), kv_head, table)
        number -= tiles
    return Tile(0, 0, 0, 0, batch.block_tables)


@njit(error_model="numpy")
def first_kv_tile(tile: Tile, shape: AttentionShape) -> int:
    """Where the first kv tile begins of which the tile sees anything."""
    return max(0, tile.position - shape.window + 1) // BLOCK_N * BLOCK_N


@njit(error_model="numpy")
def kv_tile_len(tile: Tile, base: int) -> int:
    """How many keys the tile sees of the kv tile at base, and before them."""
    return min(BLOCK_N, tile.position + tile.queries - base)
