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
With 9 heads of 64, 3 of keys, bfloat16, on two cores of an EPYC 9005: 16 decodes of 512 keys take 113 to
130 us with the cache at hand and 250 to 320 us from memory, where each core waits for as many lines as it can
at once; a prompt of 512 takes 0.72 ms.

A quantized cache costs nothing in the products: a score is multiplied by its keys' scale, a result by its
values'.
"""

from __future__ import annotations

from typing import Any

from numba import float32, njit

from fastserve_kernels.cpu.kernels.activations import as_elements
from fastserve_kernels.cpu.kernels.aligned_memory import allocate_floats, free_floats, round_up
from fastserve_kernels.cpu.kernels.attention_floats import load_kv_tile, multiply_keys, multiply_values
from fastserve_kernels.cpu.kernels.attention_pairs import (
    load_kv_pairs,
    multiply_key_pairs,
    multiply_value_pairs,
)
from fastserve_kernels.cpu.kernels.attention_scratch import (
    ROWS,
    Cache,
    Scratch,
    scratch_for,
    scratch_size,
)
from fastserve_kernels.cpu.kernels.attention_tiles import (
    BLOCK_N,
    AttentionShape,
    Batch,
    Tile,
    first_kv_tile,
    kv_tile_len,
    tile_of,
)
from fastserve_kernels.cpu.kernels.bfloat16_pairs import uses_pairs
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
    at,
    is_quantized,
    load,
    load_masked,
    reduce_add,
    reduce_max,
    round_to,
    select_range,
    splat,
    store,
    store_masked,
)

BLOCK_M = 48
"""Rows of a tile, unless one query has more: with the kv tile they fit the cache nearest to the processor."""
MASKED = -1e30
"""Less than any score, and the difference of two such is a number."""


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
    memory = allocate_floats(scratch_size(shape, tile_len))
    scratch = scratch_for(memory, shape, tile_len)
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
            load_kv_pairs(tile, shape, scratch, cache, base)
        else:
            load_kv_tile(tile, shape, scratch, cache, base)
        for row in range(0, rows, ROWS):
            # Query i sees the keys up to its own position, and down to as many as the window has.
            last = tile.position + min((row + ROWS - 1) // shape.group, tile.queries - 1)
            if base <= last and base + BLOCK_N > tile.position + row // shape.group - shape.window + 1:
                if uses_pairs(q):
                    multiply_key_pairs(shape, scratch, cache, row)
                else:
                    multiply_keys(shape, scratch, cache, row)
                for r in range(row, row + ROWS):
                    position = tile.position + min(r // shape.group, tile.queries - 1)
                    first = max(0, position - shape.window + 1 - base)
                    _softmax_step(tile, shape, scratch, q, cache, r, first, position + 1 - base)
                count = min(BLOCK_N, last + 1 - base)
                if uses_pairs(q):
                    multiply_value_pairs(shape, scratch, cache, row, count)
                else:
                    multiply_values(shape, scratch, cache, row, count)
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
def _score_scale(tile: Tile, shape: AttentionShape, cache: Cache) -> Any:
    """What the product of a query and a key is multiplied by."""
    scale = float32(shape.scale)
    if is_quantized(cache.keys):
        scale *= cache.key_scales[tile.kv_head]
    return scale


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
