"""Paged attention: one pass over the keys, with the softmax kept up as it goes (arXiv 2205.14135).

A piece of work is a tile of a sequence's queries with all query heads of one key head: these *rows* share
each key and value, which are converted to float32 once per tile, SPAN of them at a time, the keys transposed
so that a vector holds one dimension of many keys.

What is added up for a row, and in which order, depends on absolute positions alone: spans are counted from
position 0; a row's score is a sum over dimensions, its result one over keys; and what it must not see adds an
exact zero. So a token's result is the same to the last bit whatever else is in the batch, wherever its prompt
was cut, and whether it was decoded or part of a prompt.

Bound: a decode by the bytes of the cache, a prompt by 2 (D + Dv) floating-point operations per row and key.
With 9 heads of 64, 3 of keys, bfloat16, on two cores of an EPYC 9005: 16 decodes of 512 keys take 187 us
with the cache at hand and 290 us from memory, of an int8 cache 154 and 207 us; a prompt of 512 takes 0.95 ms,
which is 320 GFLOP/s.

A quantized cache costs nothing in the products: a query is multiplied by its keys' scale before, a result by
its values' scale after.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import float32, njit, types

from fastserve_kernels.cpu.kernels.kernel import Elements, Floats, Integers, Stored, Work, claim, kernel
from fastserve_kernels.cpu.kernels.tiles import SPAN, Batch, Shape, Tile, first_span, span_len, tile_of
from fastserve_kernels.cpu.kernels.vectors import (
    LANES,
    WIDE,
    as_integers,
    at,
    exp,
    is_quantized,
    largest,
    load,
    load_part,
    multiply_add,
    only,
    prefetch,
    size_of,
    splat,
    store,
    store_part,
    store_transposed,
    total,
)

ROWS = 4
"""Rows that are multiplied together: their sums of WIDE lanes fit the registers."""
TILE = 48
"""Rows of a tile, unless one query has more: with the span they fit the cache nearest to the processor."""
LINE = 64
"""Bytes that come into the cache together."""
UNSEEN = -1e30
"""Less than any score, and the difference of two such is a number."""

_allocate: Any = types.ExternalFunction("aligned_alloc", types.CPointer(float32)(types.intp, types.intp))
_free: Any = types.ExternalFunction("free", types.void(types.CPointer(float32)))


class Cache(NamedTuple):
    """Keys and values; if these are quantized they are multiples of their head's scale."""

    keys: Stored
    values: Stored
    key_scales: Floats
    value_scales: Floats


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
    coming: Integers
    """[SPAN] int64: those of the span that is next."""


@kernel
def paged_attention(
    work: Work,
    q: Elements,
    k_cache: Stored,
    v_cache: Stored,
    k_scales: Floats,
    v_scales: Floats,
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
    scales [kv_heads], which are read for quantized caches alone; out [tokens, heads, dim_v]; block_tables
    [sequences, table_width]. A softcap of 0 is none."""
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
    cache = Cache(k_cache, v_cache, k_scales, v_scales)
    batch = Batch(query_start, context_lens, block_tables, sequences, table_width, tile_len)
    tile = tile_of(batch, shape, claim(work))
    _find_span(tile, shape, scratch, first_span(tile, shape))
    while tile.queries > 0:
        following = tile_of(batch, shape, claim(work))
        _attend(tile, following, shape, scratch, q, cache, out)
        tile = following
    _free(memory)


@njit(error_model="numpy")
def _round_up(number: int, multiple: int) -> int:
    return (number + multiple - 1) // multiple * multiple


@njit(error_model="numpy")
def _scratch_size(shape: Shape, tile_len: int) -> int:
    rows = _round_up(tile_len * shape.group, ROWS)
    of_row = shape.wide_dim + SPAN + shape.wide_dim_v + 2
    return SPAN * (4 + shape.dim + shape.wide_dim_v) + rows * of_row


@njit(error_model="numpy")
def _scratch(memory: Floats, shape: Shape, tile_len: int) -> Scratch:
    rows = _round_up(tile_len * shape.group, ROWS)
    keys = at(memory, 4 * SPAN)
    values = at(keys, SPAN * shape.dim)
    queries = at(values, SPAN * shape.wide_dim_v)
    weights = at(queries, rows * shape.wide_dim)
    results = at(weights, rows * SPAN)
    peaks = at(results, rows * shape.wide_dim_v)
    sums = at(peaks, rows)
    starts, coming = as_integers(memory), as_integers(at(memory, 2 * SPAN))
    return Scratch(keys, values, queries, weights, results, peaks, sums, starts, coming)


@njit(error_model="numpy")
def _attend(
    tile: Tile, following: Tile, shape: Shape, scratch: Scratch, q: Elements, cache: Cache, out: Elements
) -> None:
    rows = _round_up(tile.queries * shape.group, ROWS)
    end = tile.position + tile.queries
    _begin(tile, shape, scratch, q, cache, rows)
    for base in range(first_span(tile, shape), end, SPAN):
        for j in range(SPAN):
            scratch.starts[j] = scratch.coming[j]
        if base + SPAN < end:
            _find_span(tile, shape, scratch, base + SPAN)
        else:
            _find_span(following, shape, scratch, first_span(following, shape))
        _load_span(tile, shape, scratch, cache, base)
        for row in range(0, rows, ROWS):
            # Query i sees the keys up to its own position, and down to as many as the window has.
            last = tile.position + min((row + ROWS - 1) // shape.group, tile.queries - 1)
            if base <= last and base + SPAN > tile.position + row // shape.group - shape.window + 1:
                _multiply_keys(shape, scratch, cache, row)
                for r in range(row, row + ROWS):
                    position = tile.position + min(r // shape.group, tile.queries - 1)
                    first = max(0, position - shape.window + 1 - base)
                    _weigh(shape, scratch, r, first, position + 1 - base)
                _add_values(shape, scratch, cache, row, min(SPAN, last + 1 - base))
    _finish(tile, shape, scratch, cache, out)


@njit(error_model="numpy")
def _begin(tile: Tile, shape: Shape, scratch: Scratch, q: Elements, cache: Cache, rows: int) -> None:
    """Scales the queries of a tile, also by the keys' scale, and clears what is added up; rows that only fill
    up are zeros."""
    factor = float32(shape.scale)
    if is_quantized(cache.keys):
        factor *= cache.key_scales[tile.kv_head]
    scale = splat(factor, LANES)
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
def _find_span(tile: Tile, shape: Shape, scratch: Scratch, base: int) -> None:
    """Looks up where the keys of the next span lie, which begins at base; beyond the last it repeats that."""
    count = span_len(tile, base)
    if count <= 0:
        return
    block, offset = base // shape.block_size, base % shape.block_size
    start = (tile.table[block] * shape.block_size + offset) * shape.kv_heads + tile.kv_head
    for j in range(count):
        if offset == shape.block_size:
            block, offset = block + 1, 0
            start = tile.table[block] * shape.block_size * shape.kv_heads + tile.kv_head
        scratch.coming[j] = start
        start += shape.kv_heads
        offset += 1
    for j in range(count, SPAN):
        scratch.coming[j] = scratch.coming[count - 1]


@njit(error_model="numpy")
def _bring(elements: Stored, start: int, count: int) -> None:
    """Has the memory of a head brought into the cache: blocks lie too far apart for the processor to foresee
    them. It can wait for few lines at once, so they are asked for between multiplications."""
    for i in range(0, count, LINE // size_of(elements)):
        prefetch(at(elements, start + i))


@njit(error_model="numpy")
def _load_span(tile: Tile, shape: Shape, scratch: Scratch, cache: Cache, base: int) -> None:
    """The keys of the span that begins at base, transposed, and its values.

    The lanes of keys that the tile does not see hold others or what was there before.
    """
    count = span_len(tile, base)
    for j in range(count):
        start = scratch.starts[j] * shape.dim_v
        for i in range(0, shape.wide_dim_v, LANES):
            value = load_part(cache.values, start + i, shape.dim_v - i)
            store(scratch.values, j * shape.wide_dim_v + i, value)
    for first in range(0, count, LANES):
        starts = at(scratch.starts, first)
        for i in range(0, shape.dim - LANES + 1, LANES):
            store_transposed(at(cache.keys, i), starts, shape.dim, scratch.keys, i * SPAN + first, SPAN)
        for i in range(shape.dim // LANES * LANES, shape.dim):
            for j in range(LANES):
                scratch.keys[i * SPAN + first + j] = total(load(cache.keys, starts[j] * shape.dim + i, 1))


@njit(error_model="numpy")
def _multiply_keys(shape: Shape, scratch: Scratch, cache: Cache, row: int) -> None:
    """The scores of ROWS rows with all keys of the span. The first rows bring the keys of the next, those of
    fewer dimensions than the span has keys a part of them."""
    first = row * shape.wide_dim
    second, third, fourth = first + shape.wide_dim, first + 2 * shape.wide_dim, first + 3 * shape.wide_dim
    for lane in range(0, SPAN, WIDE):
        a = b = c = d = splat(float32(0), WIDE)
        for i in range(shape.dim):
            if row + lane == 0:
                _bring(cache.keys, scratch.coming[i % SPAN] * shape.dim, shape.dim)
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
def _add_values(shape: Shape, scratch: Scratch, cache: Cache, row: int, count: int) -> None:
    """Adds the span's first values, weighted, to the results of ROWS rows. The first rows bring the values of
    the next."""
    if row == 0:
        for j in range(count, SPAN):
            _bring(cache.values, scratch.coming[j] * shape.dim_v, shape.dim_v)
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
            if row + i == 0:
                _bring(cache.values, scratch.coming[j] * shape.dim_v, shape.dim_v)
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
def _finish(tile: Tile, shape: Shape, scratch: Scratch, cache: Cache, out: Elements) -> None:
    """Divides the results by the sums of their weights, and multiplies them by the values' scale."""
    scale = cache.value_scales[tile.kv_head] if is_quantized(cache.values) else float32(1)
    for row in range(tile.queries * shape.group):
        query, head = row // shape.group, tile.kv_head * shape.group + row % shape.group
        to = ((tile.token + query) * shape.heads + head) * shape.dim_v
        share = splat(scale / scratch.sums[row], LANES)
        for i in range(0, shape.dim_v, LANES):
            result = load(scratch.results, row * shape.wide_dim_v + i, LANES) * share
            store_part(out, to + i, result, shape.dim_v - i)
