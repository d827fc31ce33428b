"""Paged attention of the sequences with many tokens in a step: prompts and chunks of prompts.

Bound: 2 (D + Dv) floating-point operations for each query head of a token and each key it sees, on tensor
cores. A program takes a tile of BLOCK_M rows (`attention_tiles`), that is BLOCK_M / (H / Hk) tokens with all
query heads of one key head, and goes over the keys in tiles of BLOCK_N, first those of which every row sees
all, which need no mask. Tiles with more keys are started first.

The grid holds T / tokens-of-a-tile + B tiles for each key head, which is enough however the T tokens lie in
the B sequences: sequence i has the tiles from query_start[i] / tokens-of-a-tile + i, rounded down. Programs
without a tile, or whose sequence is short enough for decode's kernel, leave at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastserve_kernels.gpu.arithmetic import rounded
from fastserve_kernels.gpu.attention_tiles import LOG2_E, attend, code_unit, load_queries


@triton.jit
def sequence_of(tile, query_start, sequences, QUERIES: tl.constexpr, SCAN: tl.constexpr):
    """The last sequence whose tiles begin at or before a tile."""
    begun = tl.sum(tl.zeros((SCAN,), tl.int32))
    for base in range(0, sequences, SCAN):
        sequence = base + tl.arange(0, SCAN)
        start = tl.load(query_start + sequence, mask=sequence < sequences, other=0)
        begun += tl.sum(((start // QUERIES + sequence <= tile) & (sequence < sequences)).to(tl.int32))
    return begun - 1


@triton.jit(do_not_specialize=["sequences", "window", "table_row"])
def prefill(
    q, k_cache, v_cache, query_start, context_lens, block_tables, k_scale, v_scale, out, sequences, scale,
    window, softcap, q_token, q_head, k_block, k_position, k_head, v_block, v_position, v_head, table_row,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, QUERIES: tl.constexpr, DECODED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr, SCAN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Takes the sequences of more than DECODED tokens; QUERIES = BLOCK_M // GROUP."""
    head = tl.program_id(0) % KV_HEADS
    number = tl.program_id(0) // KV_HEADS
    sequence = sequence_of(number, query_start, sequences, QUERIES, SCAN)
    begin = tl.load(query_start + sequence)
    length = (tl.load(query_start + sequence + 1) - begin).to(tl.int32)
    before = tl.cdiv(length, QUERIES) - 1 - (number - (begin // QUERIES).to(tl.int32) - sequence)
    before *= QUERIES
    if (length <= DECODED) | (before < 0):
        return
    start = begin + before
    query_len = tl.minimum(length - before, QUERIES)
    # What follows is as if the sequence ended with this tile's queries.
    context_len = tl.load(context_lens + sequence).to(tl.int32) - length + before + query_len

    offs_m = tl.arange(0, BLOCK_M)
    offs_dv = tl.arange(0, BLOCK_DV)
    queries, qk_scale = load_queries(
        q, start, query_len, head, q_token, q_head, k_scale is not None, GROUP, DIM, BLOCK_M, BLOCK_D
    )
    qk_scale *= scale
    if k_scale is not None:
        qk_scale *= tl.load(k_scale + head) * code_unit(k_cache.dtype.element_ty)
    if not CAPPED:
        qk_scale *= LOG2_E
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    last_position = context_len - tl.maximum(query_len - offs_m // GROUP, 1)
    k_cache += head * k_head
    v_cache += head * v_head
    table = block_tables + sequence.to(tl.int64) * table_row
    end = tl.cdiv(context_len, BLOCK_N)
    # All rows see the whole of the tiles from `entered` to `left`.
    first, entered = 0, 0
    if WINDOWED:
        first = tl.maximum(context_len - query_len + 1 - window, 0) // BLOCK_N
        entered = tl.minimum(tl.cdiv(tl.maximum(context_len - window, 0), BLOCK_N), end)
    left = tl.maximum((context_len - query_len + 1) // BLOCK_N, entered)
    for part in tl.static_range(0 if WINDOWED else 1, 3):
        acc, m_i, l_i = attend(
            queries, qk_scale, acc, m_i, l_i,
            first if part == 0 else (entered if part == 1 else left),
            entered if part == 0 else (left if part == 1 else end),
            last_position, context_len, k_cache, v_cache, table,
            k_block, k_position, v_block, v_position, window, softcap,
            part != 1, WINDOWED, CAPPED, BLOCK_SIZE, DIM, DIM_V, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    out_scale = 1.0 / l_i
    if v_scale is not None:
        out_scale *= tl.load(v_scale + head) * code_unit(v_cache.dtype.element_ty)
    offs_row = (start + offs_m // GROUP) * (KV_HEADS * GROUP) + head * GROUP + offs_m % GROUP
    tl.store(
        out + offs_row[:, None] * DIM_V + offs_dv[None, :],
        rounded(acc * out_scale[:, None], out.dtype.element_ty),
        mask=(offs_m // GROUP < query_len)[:, None] & (offs_dv < DIM_V)[None, :],
    )
