"""How paged attention is divided: a batch into tiles of queries, and the keys that these see into spans."""

from __future__ import annotations

from typing import NamedTuple

from numba import njit

from fastserve_kernels.cpu.kernels.kernel import Integers
from fastserve_kernels.cpu.kernels.vectors import at

SPAN = 64
"""Keys between two looks at the softmax."""


class Shape(NamedTuple):
    """What is the same for all pieces of work."""

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
def tile_of(batch: Batch, shape: Shape, piece: int) -> Tile:
    """The tile that is a certain piece of the batch's work; beyond the last, one of no queries."""
    number, kv_head = piece // shape.kv_heads, piece % shape.kv_heads
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
def first_span(tile: Tile, shape: Shape) -> int:
    """Where the first span begins of which the tile sees anything."""
    return max(0, tile.position - shape.window + 1) // SPAN * SPAN


@njit(error_model="numpy")
def span_len(tile: Tile, base: int) -> int:
    """How many keys the tile sees of the span at base, and before them."""
    return min(SPAN, tile.position + tile.queries - base)
