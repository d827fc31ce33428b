"""Paged attention: one pass over the keys, with the softmax kept up as it goes (arXiv 2205.14135).

A work item is a tile of a sequence's queries with all query heads of one key head: these *rows* share each
key and value, which are converted to float32 once per tile, BLOCK_N of them (a *kv tile*) at a time, the keys
transposed so that a vector holds one dimension of many keys.

What is added up for a row, and in which order, depends on absolute positions alone: tiles of keys are counted
from position 0; a row's score is a sum over dimensions, its result one over keys; and what it must not see
adds an exact zero. So a token's result is the same to the last bit whatever else is in the batch, wherever
its prompt was cut, and whether it was decoded or part of a prompt.

With bfloat16 queries and a processor that multiplies pairs of them, both products are of pairs
(`bfloat16_pairs`): adjacent dimensions of query and key, then adjacent keys of a dimension of the values. The
exponentials are rounded to bfloat16 for that, and so is what their sum is made of.

Bound: a decode by the bytes of the cache, a prompt by 2 (D + Dv) floating-point operations per row and key.
With 9 heads of 64, 3 of keys, bfloat16, on two cores of an EPYC 9005: 16 decodes of 512 keys take 113 us
with the cache at hand and 254 us from memory, where each core waits for as many lines as it can at once; a
prompt of 512 takes 0.72 ms.

A quantized cache costs nothing in the products: a score is multiplied by its keys' scale, a result by its
values'.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import float32, njit

from fastserve_kernels.cpu.kernels.activations import as_elements
from fastserve_kernels.cpu.kernels.aligned_memory import LINE, allocate_floats, free_floats, round_up
from fastserve_kernels.cpu.kernels.attention_tiles import (
    BLOCK_N,
    AttentionShape,
    Batch,
    Tile,
    first_kv_tile,
    kv_tile_len,
    tile_of,
)
from fastserve_kernels.cpu.kernels.bfloat16_pairs import (
    PAIR_COLUMNS,
    as_int32,
    dot_pairs,
    store_pairs,
    store_transposed_pairs,
    uses_pairs,
)
from fastserve_kernels.cpu.kernels.kernel import (
    Elements,
    Floats,
    Integers,
    Stored,
    WorkCounter,
    fetch_add,
    kernel,
)
from fastserve_kernels.cpu.kernels.vector_math import exp
from fastserve_kernels.cpu.kernels.vectors import (
    LANES,
    WIDE,
    as_int64,
    at,
    is_quantized,
    load,
    load_masked,
    multiply_add,
    prefetch,
    reduce_add,
    reduce_max,
    round_to,
    select_range,
    size_of,
    splat,
    store,
    store_masked,
    store_transposed,
)

ROWS = 4
"""Rows that are multiplied together: their sums of WIDE lanes fit the registers."""
BLOCK_M = 48
"""Rows of a tile, unless one query has more: with the kv tile they fit the cache nearest to the processor."""
MASKED = -1e30
"""Less than any score, and the difference of two such is a number."""


class Cache(NamedTuple):
    """Keys and values; if these are quantized they are multiples of their head's scale."""

    keys: Stored
    values: Stored
    key_scales: Floats
    value_scales: Floats


class Scratch(NamedTuple):
    """A thread's memory, in float32: one kv tile of keys and values, and the rows of a tile."""

    keys: Floats
    """[dim, BLOCK_N]."""
    values: Floats
    """[BLOCK_N, wide_dim_v]."""
    queries: Floats
    """[rows, wide_dim], scaled."""
    p: Floats
    """[rows, BLOCK_N]: scores, then their exponentials."""
    acc: Floats
    """[rows, wide_dim_v]: the sum of exponential times value so far."""
    m_i: Floats
    """[rows]: the largest score so far, which is subtracted before the exponential."""
    l_i: Floats
    """[rows]: the sum of exponentials so far."""
    starts: Integers
    """[BLOCK_N] int64: which of the cache's keys each is, counting heads and all."""
    next_starts: Integers
    """[BLOCK_N] int64: those of the kv tile that is next."""


@kernel
def paged_attention(
    counter: WorkCounter,
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
    shape = AttentionShape(
        heads,
        kv_heads,
        group,
        dim,
        dim_v,
        round_up(dim, LANES),
        round_up(dim_v, WIDE),
        block_size,
        q_stride,
        window,
        scale,
        softcap,
    )
    tile_len = max(1, BLOCK_M // group)
    memory = allocate_floats(_scratch_size(shape, tile_len))
    scratch = _scratch(memory, shape, tile_len)
    cache = Cache(k_cache, v_cache, k_scales, v_scales)
    batch = Batch(query_start, context_lens, block_tables, sequences, table_width, tile_len)
    tile = tile_of(batch, shape, fetch_add(counter))
    _locate_kv_tile(tile, shape, scratch, first_kv_tile(tile, shape))
    while tile.queries > 0:
        following = tile_of(batch, shape, fetch_add(counter))
        _attend(tile, following, shape, scratch, q, cache, out)
        tile = following
    free_floats(memory)


@njit(error_model="numpy")
def _scratch_size(shape: AttentionShape, tile_len: int) -> int:
    rows = round_up(tile_len * shape.group, ROWS)
    of_row = shape.wide_dim + BLOCK_N + shape.wide_dim_v + 2
    return BLOCK_N * (4 + shape.wide_dim + shape.wide_dim_v) + rows * of_row


@njit(error_model="numpy")
def _scratch(memory: Floats, shape: AttentionShape, tile_len: int) -> Scratch:
    rows = round_up(tile_len * shape.group, ROWS)
    keys = at(memory, 4 * BLOCK_N)
    values = at(keys, BLOCK_N * shape.wide_dim)
    queries = at(values, BLOCK_N * shape.wide_dim_v)
    p = at(queries, rows * shape.wide_dim)
    acc = at(p, rows * BLOCK_N)
    m_i = at(acc, rows * shape.wide_dim_v)
    l_i = at(m_i, rows)
    starts, next_starts = as_int64(memory), as_int64(at(memory, 2 * BLOCK_N))
    return Scratch(keys, values, queries, p, acc, m_i, l_i, starts, next_starts)


@njit(error_model="numpy")
def _attend(
    tile: Tile,
    following: Tile,
    shape: AttentionShape,
    scratch: Scratch,
    q: Elements,
    cache: Cache,
    out: Elements,
) -> None:
    rows = round_up(tile.queries * shape.group, ROWS)
    end = tile.position + tile.queries
    _init_tile(tile, shape, scratch, q, cache, rows)
    for base in range(first_kv_tile(tile, shape), end, BLOCK_N):
        for j in range(BLOCK_N):
            scratch.starts[j] = scratch.next_starts[j]
        if base + BLOCK_N < end:
            _locate_kv_tile(tile, shape, scratch, base + BLOCK_N)
        else:
            _locate_kv_tile(following, shape, scratch, first_kv_tile(following, shape))
        if uses_pairs(q):
            _load_kv_pairs(tile, shape, scratch, cache, base)
        else:
            _load_kv_tile(tile, shape, scratch, cache, base)
        for row in range(0, rows, ROWS):
            # Query i sees the keys up to its own position, and down to as many as the window has.
            last = tile.position + min((row + ROWS - 1) // shape.group, tile.queries - 1)
            if base <= last and base + BLOCK_N > tile.position + row // shape.group - shape.window + 1:
                if uses_pairs(q):
                    _multiply_key_pairs(shape, scratch, cache, row)
                else:
                    _multiply_keys(shape, scratch, cache, row)
                for r in range(row, row + ROWS):
                    position = tile.position + min(r // shape.group, tile.queries - 1)
                    first = max(0, position - shape.window + 1 - base)
                    _softmax_step(tile, shape, scratch, q, cache, r, first, position + 1 - base)
                count = min(BLOCK_N, last + 1 - base)
                if uses_pairs(q):
                    _multiply_value_pairs(shape, scratch, cache, row, count)
                else:
                    _multiply_values(shape, scratch, cache, row, count)
    _finish(tile, shape, scratch, cache, out)


@njit(error_model="numpy")
def _init_tile(
    tile: Tile, shape: AttentionShape, scratch: Scratch, q: Elements, cache: Cache, rows: int
) -> None:
    """Scales the queries of a tile, also by the keys' scale, unless they meet these as pairs, and clears what
    is added up; rows that only fill up are zeros."""
    scale = splat(float32(1) if uses_pairs(q) else _score_scale(tile, shape, cache), LANES)
    zero = splat(float32(0), LANES)
    pairs = as_elements(q, scratch.queries)
    for row in range(rows):
        query, head = row // shape.group, tile.kv_head * shape.group + row % shape.group
        start = (tile.token + query) * shape.q_stride + head * shape.dim
        for i in range(0, shape.wide_dim, LANES):
            part = zero
            if query < tile.queries:
                part = load_masked(q, start + i, shape.dim - i) * scale
            if uses_pairs(q):
                store(pairs, row * 2 * shape.wide_dim + i, part)
            else:
                store(scratch.queries, row * shape.wide_dim + i, part)
        for i in range(0, shape.wide_dim_v, LANES):
            store(scratch.acc, row * shape.wide_dim_v + i, zero)
        scratch.m_i[row] = MASKED
        scratch.l_i[row] = 0


@njit(error_model="numpy")
def _locate_kv_tile(tile: Tile, shape: AttentionShape, scratch: Scratch, base: int) -> None:
    """Looks up where the keys of the next kv tile lie, which begins at base; beyond the last it repeats
    that."""
    count = kv_tile_len(tile, base)
    if count <= 0:
        return
    block, offset = base // shape.block_size, base % shape.block_size
    start = (tile.table[block] * shape.block_size + offset) * shape.kv_heads + tile.kv_head
    for j in range(count):
        if offset == shape.block_size:
            block, offset = block + 1, 0
            start = tile.table[block] * shape.block_size * shape.kv_heads + tile.kv_head
        scratch.next_starts[j] = start
        start += shape.kv_heads
        offset += 1
    for j in range(count, BLOCK_N):
        scratch.next_starts[j] = scratch.next_starts[count - 1]


@njit(error_model="numpy")
def _prefetch_head(elements: Stored, start: int, count: int) -> None:
    """Has the memory of a head brought into the cache: blocks lie too far apart for the processor to foresee
    them. It can wait for few lines at once, so they are asked for between multiplications."""
    for i in range(0, count, LINE // size_of(elements)):
        prefetch(at(elements, start + i))


@njit(error_model="numpy")
def _load_kv_tile(tile: Tile, shape: AttentionShape, scratch: Scratch, cache: Cache, base: int) -> None:
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
def _score_scale(tile: Tile, shape: AttentionShape, cache: Cache) -> Any:
    """What the product of a query and a key is multiplied by."""
    scale = float32(shape.scale)
    if is_quantized(cache.keys):
        scale *= cache.key_scales[tile.kv_head]
    return scale


@njit(error_model="numpy")
def _load_kv_pairs(tile: Tile, shape: AttentionShape, scratch: Scratch, cache: Cache, base: int) -> None:
    """`_load_kv_tile` for products of pairs: adjacent dimensions of a key, and a dimension of the values of
    adjacent keys; 0 for a last key that has no neighbour."""
    count = kv_tile_len(tile, base)
    keys, values = as_int32(scratch.keys), as_int32(scratch.values)
    zero = splat(float32(0), LANES)
    for j in range(0, count, 2):
        start, next_start = scratch.starts[j] * shape.dim_v, scratch.starts[j + 1] * shape.dim_v
        for i in range(0, shape.wide_dim_v, LANES):
            value, next_value = load_masked(cache.values, start + i, shape.dim_v - i), zero
            if j + 1 < count:
                next_value = load_masked(cache.values, next_start + i, shape.dim_v - i)
            store_pairs(value, next_value, values, j // 2 * shape.wide_dim_v + i)
    for first in range(0, count, LANES):
        starts = at(scratch.starts, first)
        for i in range(0, shape.dim, PAIR_COLUMNS):
            to = i // 2 * BLOCK_N + first
            store_transposed_pairs(at(cache.keys, i), starts, shape.dim, shape.dim - i, keys, to, BLOCK_N)


@njit(error_model="numpy")
def _multiply_key_pairs(shape: AttentionShape, scratch: Scratch, cache: Cache, row: int) -> None:
    """`_multiply_keys` by pairs of dimensions; scores are not scaled yet."""
    queries, keys = as_int32(scratch.queries), as_int32(scratch.keys)
    first = row * shape.wide_dim
    second, third, fourth = first + shape.wide_dim, first + 2 * shape.wide_dim, first + 3 * shape.wide_dim
    for lane in range(0, BLOCK_N, WIDE):
        a = b = c = d = splat(float32(0), WIDE)
        for i in range((shape.dim + 1) // 2):
            if row + lane == 0:
                _prefetch_head(cache.keys, scratch.next_starts[2 * i % BLOCK_N] * shape.dim, shape.dim)
                _prefetch_head(cache.keys, scratch.next_starts[(2 * i + 1) % BLOCK_N] * shape.dim, shape.dim)
            place = i * BLOCK_N + lane
            a = dot_pairs(a, keys, place, queries[first + i])
            b = dot_pairs(b, keys, place, queries[second + i])
            c = dot_pairs(c, keys, place, queries[third + i])
            d = dot_pairs(d, keys, place, queries[fourth + i])
        to = row * BLOCK_N + lane
        store(scratch.p, to, a)
        store(scratch.p, to + BLOCK_N, b)
        store(scratch.p, to + 2 * BLOCK_N, c)
        store(scratch.p, to + 3 * BLOCK_N, d)


@njit(error_model="numpy")
def _multiply_value_pairs(
    shape: AttentionShape, scratch: Scratch, cache: Cache, row: int, count: int
) -> None:
    """`_multiply_values` by pairs of keys."""
    p, values = as_int32(scratch.p), as_int32(scratch.values)
    if row == 0:
        for j in range((count + 1) // 2 * 2, BLOCK_N):
            _prefetch_head(cache.values, scratch.next_starts[j] * shape.dim_v, shape.dim_v)
    for i in range(0, shape.wide_dim_v, WIDE):
        first = row * shape.wide_dim_v + i
        second, third, fourth = (
            first + shape.wide_dim_v,
            first + 2 * shape.wide_dim_v,
            first + 3 * shape.wide_dim_v,
        )
        a, b = load(scratch.acc, first, WIDE), load(scratch.acc, second, WIDE)
        c, d = load(scratch.acc, third, WIDE), load(scratch.acc, fourth, WIDE)
        for j in range((count + 1) // 2):
            if row + i == 0:
                _prefetch_head(cache.values, scratch.next_starts[2 * j] * shape.dim_v, shape.dim_v)
                _prefetch_head(cache.values, scratch.next_starts[2 * j + 1] * shape.dim_v, shape.dim_v)
            place, weight = j * shape.wide_dim_v + i, row * BLOCK_N + j
            a = dot_pairs(a, values, place, p[weight])
            b = dot_pairs(b, values, place, p[weight + BLOCK_N])
            c = dot_pairs(c, values, place, p[weight + 2 * BLOCK_N])
            d = dot_pairs(d, values, place, p[weight + 3 * BLOCK_N])
        store(scratch.acc, first, a)
        store(scratch.acc, second, b)
        store(scratch.acc, third, c)
        store(scratch.acc, fourth, d)


@njit(error_model="numpy")
def _multiply_keys(shape: AttentionShape, scratch: Scratch, cache: Cache, row: int) -> None:
    """The scores of ROWS rows with all keys of the kv tile. The first rows bring the keys of the next, those
    of fewer dimensions than the kv tile has keys a part of them."""
    first = row * shape.wide_dim
    second, third, fourth = first + shape.wide_dim, first + 2 * shape.wide_dim, first + 3 * shape.wide_dim
    for lane in range(0, BLOCK_N, WIDE):
        a = b = c = d = splat(float32(0), WIDE)
        for i in range(shape.dim):
            if row + lane == 0:
                _prefetch_head(cache.keys, scratch.next_starts[i % BLOCK_N] * shape.dim, shape.dim)
            key = load(scratch.keys, i * BLOCK_N + lane, WIDE)
            a = multiply_add(splat(scratch.queries[first + i], WIDE), key, a)
            b = multiply_add(splat(scratch.queries[second + i], WIDE), key, b)
            c = multiply_add(splat(scratch.queries[third + i], WIDE), key, c)
            d = multiply_add(splat(scratch.queries[fourth + i], WIDE), key, d)
        to = row * BLOCK_N + lane
        store(scratch.p, to, a)
        store(scratch.p, to + BLOCK_N, b)
        store(scratch.p, to + 2 * BLOCK_N, c)
        store(scratch.p, to + 3 * BLOCK_N, d)


@njit(error_model="numpy")
def _softmax_step(
    tile: Tile,
    shape: AttentionShape,
    scratch: Scratch,
    q: Elements,
    cache: Cache,
    row: int,
    first: int,
    end: int,
) -> None:
    """Turns the scores of a row into exponentials; it sees the keys first to end of the kv tile. Those that
    meet values as pairs are rounded, and their sum is that of the rounded ones."""
    zero = float32(0)
    pairs = as_elements(q, at(scratch.p, row * BLOCK_N))
    if end <= 0 or first >= BLOCK_N:
        store(scratch.p, row * BLOCK_N, splat(zero, BLOCK_N))
        return
    scores = load(scratch.p, row * BLOCK_N, BLOCK_N)
    if uses_pairs(q):
        scores = scores * splat(_score_scale(tile, shape, cache), BLOCK_N)
    if shape.softcap > 0:
        scores = _cap(scores, float32(shape.softcap))
    scores = select_range(scores, first, end, float32(MASKED))
    m_old = scratch.m_i[row]
    m_new = max(m_old, reduce_max(scores))
    p = select_range(exp(scores - splat(m_new, BLOCK_N)), first, end, zero)
    if uses_pairs(q):
        p = round_to(q, p)
        store(pairs, 0, p)
    else:
        store(scratch.p, row * BLOCK_N, p)
    added = reduce_add(p)
    if m_new > m_old:
        alpha = exp(splat(m_old - m_new, LANES))
        for i in range(0, shape.wide_dim_v, LANES):
            place = row * shape.wide_dim_v + i
            store(scratch.acc, place, load(scratch.acc, place, LANES) * alpha)
        scratch.l_i[row] *= reduce_max(alpha)
        scratch.m_i[row] = m_new
    scratch.l_i[row] += added


@njit(error_model="numpy")
def _cap(scores: Any, softcap: Any) -> Any:
    """softcap * tanh(score / softcap); tanh x = 1 - 2 / (e^2x + 1)."""
    one = splat(float32(1), BLOCK_N)
    power = exp(scores * splat(float32(2) / softcap, BLOCK_N))
    return splat(softcap, BLOCK_N) * (one - (one + one) / (power + one))


@njit(error_model="numpy")
def _multiply_values(shape: AttentionShape, scratch: Scratch, cache: Cache, row: int, count: int) -> None:
    """Adds the kv tile's first values, weighted, to the results of ROWS rows. The first rows bring the values
    of the next."""
    if row == 0:
        for j in range(count, BLOCK_N):
            _prefetch_head(cache.values, scratch.next_starts[j] * shape.dim_v, shape.dim_v)
    for i in range(0, shape.wide_dim_v, WIDE):
        first = row * shape.wide_dim_v + i
        second, third, fourth = (
            first + shape.wide_dim_v,
            first + 2 * shape.wide_dim_v,
            first + 3 * shape.wide_dim_v,
        )
        a, b = load(scratch.acc, first, WIDE), load(scratch.acc, second, WIDE)
        c, d = load(scratch.acc, third, WIDE), load(scratch.acc, fourth, WIDE)
        for j in range(count):
            if row + i == 0:
                _prefetch_head(cache.values, scratch.next_starts[j] * shape.dim_v, shape.dim_v)
            value = load(scratch.values, j * shape.wide_dim_v + i, WIDE)
            weight = row * BLOCK_N + j
            a = multiply_add(splat(scratch.p[weight], WIDE), value, a)
            b = multiply_add(splat(scratch.p[weight + BLOCK_N], WIDE), value, b)
            c = multiply_add(splat(scratch.p[weight + 2 * BLOCK_N], WIDE), value, c)
            d = multiply_add(splat(scratch.p[weight + 3 * BLOCK_N], WIDE), value, d)
        store(scratch.acc, first, a)
        store(scratch.acc, second, b)
        store(scratch.acc, third, c)
        store(scratch.acc, fourth, d)


@njit(error_model="numpy")
def _finish(tile: Tile, shape: AttentionShape, scratch: Scratch, cache: Cache, out: Elements) -> None:
    """Divides the results by the sums of their weights, and multiplies them by the values' scale."""
    scale = cache.value_scales[tile.kv_head] if is_quantized(cache.values) else float32(1)
    for row in range(tile.queries * shape.group):
        query, head = row // shape.group, tile.kv_head * shape.group + row % shape.group
        to = ((tile.token + query) * shape.heads + head) * shape.dim_v
        share = splat(scale / scratch.l_i[row], LANES)
        for i in range(0, shape.dim_v, LANES):
            result = load(scratch.acc, row * shape.wide_dim_v + i, LANES) * share
            store_masked(out, to + i, result, shape.dim_v - i)
