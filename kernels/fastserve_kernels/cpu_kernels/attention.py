"""Paged attention: one pass over the keys, with the softmax kept up as it goes (arXiv 2205.14135).

A piece of work is a tile of a sequence's queries with all query heads of one key head: these *rows* share
each key and value, which are converted to float32 once per tile, SPAN of them at a time, the keys transposed
so that a vector holds one dimension of many keys.

What is added up for a row, and in which order, depends on absolute positions alone: spans are counted from
position 0; a row's score is a sum over dimensions, its result one over keys; and what it must not see adds an
exact zero. So a token's result is the same to the last bit whatever else is in the batch, wherever its prompt
was cut, and whether it was decoded or part of a prompt.

Bound: a decode by the bytes of the cache, a prompt by 2 (D + Dv) floating-point operations per row and key.
With 9 heads of 64, 3 of keys, bfloat16, on two cores of an EPYC 9005: 16 decodes of 220 keys take 88 us with
the cache at hand and 137 us from memory, where its 2.7 MB alone take 90; a prompt of 512 takes 0.95 ms, which
is 320 GFLOP/s.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import float32, njit, types

from fastserve_kernels.cpu_kernels.kernel import Elements, Integers, Work, claim, kernel
from fastserve_kernels.cpu_kernels.vectors import (
    LANES,
    WIDE,
    as_integers,
    at,
    exp,
    largest,
    load,
    load_part,
    multiply_add,
    only,
    prefetch,
    splat,
    store,
    store_part,
    store_transposed,
    total,
)

SPAN = 64
"""Keys between two looks at the softmax."""
ROWS = 4
"""Rows that are multiplied together: their sums of WIDE lanes fit the registers."""
TILE = 48
"""Rows of a tile, unless one query has more: with the span they fit the cache nearest to the processor."""
LINE = 32
"""Elements of two bytes that come into the cache together."""
UNSEEN = -1e30
"""Less than any score, and the difference of two such is a number."""

Floats = Any
"""A pointer to float32."""

_allocate: Any = types.ExternalFunction("aligned_alloc", types.CPointer(float32)(types.intp, types.intp))
_free: Any = types.ExternalFunction("free", types.void(types.CPointer(float32)))


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


class Scratch(NamedTuple):
    """A thread's memory, in float32: one span of keys and values, and the rows of a tile."""

    keys: Floats
    """[dim, SPAN]."""
    values: Floats
    """[SPAN, wide_dim_v]."""
    queries: Floats
    """[rows, wide_dim], scaled."""
    weights: Floats
    """[rows, SPAN]: scores, then their exponentials."""
    results: Floats
    """[rows, wide_dim_v]: the sum of exponential times value so far."""
    peaks: Floats
    """[rows]: the largest score so far, which is subtracted before the exponential."""
    sums: Floats
    """[rows]: the sum of exponentials so far."""
    starts: Integers
    """[SPAN] int64: which of the cache's keys each is, counting heads and all."""


@kernel
def paged_attention(
    work: Work,
    q: Elements,
    k_cache: Elements,
    v_cache: Elements,
    out: Elements,
    query_start: Integers,
    context_lens: Integers,
    block_tables: Integers,
    sequences: int,
    table_width: int,
    block_size: int,
    heads: int,
    kv_heads: int,
    dim: int,
    dim_v: int,
    q_stride: int,
    window: int,
    scale: float,
    softcap: float,
) -> None:
    """q [tokens, heads, dim], its tokens q_stride apart; caches [blocks, block_size, kv_heads, dim or dim_v];
    out [tokens, heads, dim_v]; block_tables [sequences, table_width]. A softcap of 0 is none."""
    group = heads // kv_heads
    shape = Shape(
        heads,
        kv_heads,
        group,
        dim,
        dim_v,
        _round_up(dim, LANES),
        _round_up(dim_v, WIDE),
        block_size,
        q_stride,
        window,
        scale,
        softcap,
    )
    tile_len = max(1, TILE // group)
    memory = _allocate(64, _round_up(4 * _scratch_size(shape, tile_len), 64))
    scratch = _scratch(memory, shape, tile_len)
    batch = Batch(query_start, context_lens, block_tables, sequences, table_width, tile_len)
    tile = _tile(batch, shape, claim(work))
    while tile.queries > 0:
        following = _tile(batch, shape, claim(work))
        _find_span(following, shape, scratch, k_cache, v_cache, _first_span(following, shape))
        _attend(tile, shape, scratch, q, k_cache, v_cache, out)
        tile = following
    _free(memory)


@njit(error_model="numpy")
def _tile(batch: Batch, shape: Shape, piece: int) -> Tile:
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
def _round_up(number: int, multiple: int) -> int:
    return (number + multiple - 1) // multiple * multiple


@njit(error_model="numpy")
def _scratch_size(shape: Shape, tile_len: int) -> int:
    rows = _round_up(tile_len * shape.group, ROWS)
    of_row = shape.wide_dim + SPAN + shape.wide_dim_v + 2
    return SPAN * (2 + shape.dim + shape.wide_dim_v) + rows * of_row


@njit(error_model="numpy")
def _scratch(memory: Floats, shape: Shape, tile_len: int) -> Scratch:
    rows = _round_up(tile_len * shape.group, ROWS)
    keys = at(memory, 2 * SPAN)
    values = at(keys, SPAN * shape.dim)
    queries = at(values, SPAN * shape.wide_dim_v)
    weights = at(queries, rows * shape.wide_dim)
    results = at(weights, rows * SPAN)
    peaks = at(results, rows * shape.wide_dim_v)
    return Scratch(keys, values, queries, weights, results, peaks, at(peaks, rows), as_integers(memory))


@njit(error_model="numpy")
def _attend(
    tile: Tile,
    shape: Shape,
    scratch: Scratch,
    q: Elements,
    k_cache: Elements,
    v_cache: Elements,
    out: Elements,
) -> None:
    rows = _round_up(tile.queries * shape.group, ROWS)
    _begin(tile, shape, scratch, q, rows)
    first = _first_span(tile, shape)
    _find_span(tile, shape, scratch, k_cache, v_cache, first)
    for base in range(first, tile.position + tile.queries, SPAN):
        _load_span(tile, shape, scratch, k_cache, v_cache, base)
        _find_span(tile, shape, scratch, k_cache, v_cache, base + SPAN)
        for row in range(0, rows, ROWS):
            # Query i sees the keys up to its own position, and down to as many as the window has.
            last = tile.position + min((row + ROWS - 1) // shape.group, tile.queries - 1)
            if base <= last and base + SPAN > tile.position + row // shape.group - shape.window + 1:
                _multiply_keys(shape, scratch, row)
                for r in range(row, row + ROWS):
                    position = tile.position + min(r // shape.group, tile.queries - 1)
                    first = max(0, position - shape.window + 1 - base)
                    _weigh(shape, scratch, r, first, position + 1 - base)
                _add_values(shape, scratch, row, min(SPAN, last + 1 - base))
    _finish(tile, shape, scratch, out)


@njit(error_model="numpy")
def _begin(tile: Tile, shape: Shape, scratch: Scratch, q: Elements, rows: int) -> None:
    """Scales the queries of a tile and clears what is added up; rows that only fill up are zeros."""
    scale = splat(float32(shape.scale), LANES)
    zero = splat(float32(0), LANES)
    for row in range(rows):
        query, head = row // shape.group, tile.kv_head * shape.group + row % shape.group
        start = (tile.token + query) * shape.q_stride + head * shape.dim
        for i in range(0, shape.wide_dim, LANES):
            part = zero
            if query < tile.queries:
                part = load_part(q, start + i, shape.dim - i) * scale
            store(scratch.queries, row * shape.wide_dim + i, part)
        for i in range(0, shape.wide_dim_v, LANES):
            store(scratch.results, row * shape.wide_dim_v + i, zero)
        scratch.peaks[row] = UNSEEN
        scratch.sums[row] = 0


@njit(error_model="numpy")
def _first_span(tile: Tile, shape: Shape) -> int:
    """Where the first span begins of which the tile sees anything."""
    return max(0, tile.position - shape.window + 1) // SPAN * SPAN


@njit(error_model="numpy")
def _span_len(tile: Tile, base: int) -> int:
    """How many keys the tile sees of the span at base, and before them."""
    return min(SPAN, tile.position + tile.queries - base)


@njit(error_model="numpy")
def _find_span(
    tile: Tile, shape: Shape, scratch: Scratch, k_cache: Elements, v_cache: Elements, base: int
) -> None:
    """Looks up where the keys of the span at base lie, and has these and the values brought into the cache:
    blocks lie too far apart for the processor to foresee them. A last sixteen repeats what is last."""
    count = _span_len(tile, base)
    if count <= 0:
        return
    block, offset = base // shape.block_size, base % shape.block_size
    start = (tile.table[block] * shape.block_size + offset) * shape.kv_heads + tile.kv_head
    for j in range(count):
        if offset == shape.block_size:
            block, offset = block + 1, 0
            start = tile.table[block] * shape.block_size * shape.kv_heads + tile.kv_head
        scratch.starts[j] = start
        for i in range(0, shape.dim, LINE):
            prefetch(at(k_cache, start * shape.dim + i))
        for i in range(0, shape.dim_v, LINE):
            prefetch(at(v_cache, start * shape.dim_v + i))
        start += shape.kv_heads
        offset += 1
    for j in range(count, _round_up(count, LANES)):
        scratch.starts[j] = scratch.starts[count - 1]


@njit(error_model="numpy")
def _load_span(
    tile: Tile, shape: Shape, scratch: Scratch, k_cache: Elements, v_cache: Elements, base: int
) -> None:
    """The keys of the span that was found last, transposed, and its values.

    The lanes of keys that the tile does not see hold others or what was there before.
    """
    count = _span_len(tile, base)
    for j in range(count):
        start = scratch.starts[j] * shape.dim_v
        for i in range(0, shape.wide_dim_v, LANES):
            value = load_part(v_cache, start + i, shape.dim_v - i)
            store(scratch.values, j * shape.wide_dim_v + i, value)
    for first in range(0, count, LANES):
        starts = at(scratch.starts, first)
        for i in range(0, shape.dim - LANES + 1, LANES):
            store_transposed(at(k_cache, i), starts, shape.dim, scratch.keys, i * SPAN + first, SPAN)
        for i in range(shape.dim // LANES * LANES, shape.dim):
            for j in range(LANES):
                scratch.keys[i * SPAN + first + j] = total(load(k_cache, starts[j] * shape.dim + i, 1))


@njit(error_model="numpy")
def _multiply_keys(shape: Shape, scratch: Scratch, row: int) -> None:
    """The scores of ROWS rows with all keys of the span."""
    first = row * shape.wide_dim
    second, third, fourth = first + shape.wide_dim, first + 2 * shape.wide_dim, first + 3 * shape.wide_dim
    for lane in range(0, SPAN, WIDE):
        a = b = c = d = splat(float32(0), WIDE)
        for i in range(shape.dim):
            key = load(scratch.keys, i * SPAN + lane, WIDE)
            a = multiply_add(splat(scratch.queries[first + i], WIDE), key, a)
            b = multiply_add(splat(scratch.queries[second + i], WIDE), key, b)
            c = multiply_add(splat(scratch.queries[third + i], WIDE), key, c)
            d = multiply_add(splat(scratch.queries[fourth + i], WIDE), key, d)
        to = row * SPAN + lane
        store(scratch.weights, to, a)
        store(scratch.weights, to + SPAN, b)
        store(scratch.weights, to + 2 * SPAN, c)
        store(scratch.weights, to + 3 * SPAN, d)


@njit(error_model="numpy")
def _weigh(shape: Shape, scratch: Scratch, row: int, first: int, end: int) -> None:
    """Turns the scores of a row into exponentials; it sees the keys first to end of the span."""
    zero = float32(0)
    if end <= 0 or first >= SPAN:
        store(scratch.weights, row * SPAN, splat(zero, SPAN))
        return
    scores = load(scratch.weights, row * SPAN, SPAN)
    if shape.softcap > 0:
        scores = _cap(scores, float32(shape.softcap))
    scores = only(scores, first, end, float32(UNSEEN))
    before = scratch.peaks[row]
    peak = max(before, largest(scores))
    weights = only(exp(scores - splat(peak, SPAN)), first, end, zero)
    store(scratch.weights, row * SPAN, weights)
    added = total(weights)
    if peak > before:
        fading = exp(splat(before - peak, LANES))
        for i in range(0, shape.wide_dim_v, LANES):
            place = row * shape.wide_dim_v + i
            store(scratch.results, place, load(scratch.results, place, LANES) * fading)
        scratch.sums[row] *= largest(fading)
        scratch.peaks[row] = peak
    scratch.sums[row] += added


@njit(error_model="numpy")
def _cap(scores: Any, softcap: Any) -> Any:
    """softcap * tanh(score / softcap); tanh x = 1 - 2 / (e^2x + 1)."""
    one = splat(float32(1), SPAN)
    power = exp(scores * splat(float32(2) / softcap, SPAN))
    return splat(softcap, SPAN) * (one - (one + one) / (power + one))


@njit(error_model="numpy")
def _add_values(shape: Shape, scratch: Scratch, row: int, count: int) -> None:
    """Adds the span's first values, weighted, to the results of ROWS rows."""
    for i in range(0, shape.wide_dim_v, WIDE):
        first = row * shape.wide_dim_v + i
        second, third, fourth = (
            first + shape.wide_dim_v,
            first + 2 * shape.wide_dim_v,
            first + 3 * shape.wide_dim_v,
        )
        a, b = load(scratch.results, first, WIDE), load(scratch.results, second, WIDE)
        c, d = load(scratch.results, third, WIDE), load(scratch.results, fourth, WIDE)
        for j in range(count):
            value = load(scratch.values, j * shape.wide_dim_v + i, WIDE)
            weight = row * SPAN + j
            a = multiply_add(splat(scratch.weights[weight], WIDE), value, a)
            b = multiply_add(splat(scratch.weights[weight + SPAN], WIDE), value, b)
            c = multiply_add(splat(scratch.weights[weight + 2 * SPAN], WIDE), value, c)
            d = multiply_add(splat(scratch.weights[weight + 3 * SPAN], WIDE), value, d)
        store(scratch.results, first, a)
        store(scratch.results, second, b)
        store(scratch.results, third, c)
        store(scratch.results, fourth, d)


@njit(error_model="numpy")
def _finish(tile: Tile, shape: Shape, scratch: Scratch, out: Elements) -> None:
    """Divides the results by the sums of their weights."""
    for row in range(tile.queries * shape.group):
        query, head = row // shape.group, tile.kv_head * shape.group + row % shape.group
        to = ((tile.token + query) * shape.heads + head) * shape.dim_v
        share = splat(float32(1) / scratch.sums[row], LANES)
        for i in range(0, shape.dim_v, LANES):
            result = load(scratch.results, row * shape.wide_dim_v + i, LANES) * share
            store_part(out, to + i, result, shape.dim_v - i)
