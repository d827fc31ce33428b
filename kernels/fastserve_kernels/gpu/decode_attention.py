"""Paged attention of the sequences that have few tokens in a step: decoding, and checking drafted tokens.

Bound: the bytes of the keys and values, each read once. So what a program must have is bytes on their way:
tiles of BLOCK_N keys come through num_stages buffers, 16 bytes a thread, while tensor cores multiply those
that have come with the rows of one key head (`attention_tiles`), filled up to 16. With heads of 128 in two
bytes a warp issues 440 instructions for a tile of 64 keys, 32 KB: on an H200 a quarter of what its schedulers
can issue while that comes from memory. With int8 it is 500, with float8 590 for 16 KB: half of it and more.

The keys of all sequences and key heads, cut into tiles, are one line of work, of which each program
takes an equal share (stream-K, arXiv 2301.03598): as many programs as the GPU holds at once, so that no last
wave runs half empty, however unequal the contexts, and however wide the block table is. The line goes
by sequence, key head, position. A program that has all tiles of a sequence and head writes the result; one
that has a part writes this and the logarithm of its sum to one of its two slots, and `combine` adds the parts
in the order of positions: the result depends on the batch only by how it is rounded, never on timing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastserve_kernels.gpu.arithmetic import rounded
from fastserve_kernels.gpu.attention_tiles import LOG2_E, attend, code_unit, load_queries

PARTS = tl.constexpr(16)
"""Parts of a result that are read together to be added up."""


@triton.jit
def _tiles(
    query_len, context_len, window, WINDOWED: tl.constexpr, QUERIES: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The (first, end) of the key tiles that the queries of a sequence see; none if these are not ours."""
    first = context_len * 0
    if WINDOWED:
        first = tl.maximum(context_len - query_len + 1 - window, 0) // BLOCK_N
    end = tl.cdiv(context_len, BLOCK_N)
    ours = (query_len > 0) & (query_len <= QUERIES)
    return first, tl.where(ours, end, first)


@triton.jit
def _lengths(query_start, context_lens, sequence, sequences):
    """(queries, keys) of sequences by number; 0 for numbers beyond the last."""
    mask = sequence < sequences
    start = tl.load(query_start + sequence, mask=mask, other=0)
    query_len = tl.load(query_start + sequence + 1, mask=mask, other=0) - start
    context_len = tl.load(context_lens + sequence, mask=mask, other=0)
    return query_len.to(tl.int32), context_len.to(tl.int32)


@triton.jit
def _count_tiles(
    query_start, context_lens, before, sequences, window, WINDOWED: tl.constexpr, QUERIES: tl.constexpr,
    BLOCK_N: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Key tiles of (all sequences, those before sequence `before`)."""
    total, earlier = tl.sum(tl.zeros((SCAN,), tl.int32)), tl.sum(tl.zeros((SCAN,), tl.int32))
    for base in range(0, sequences, SCAN):
        sequence = base + tl.arange(0, SCAN)
        query_len, context_len = _lengths(query_start, context_lens, sequence, sequences)
        first, end = _tiles(query_len, context_len, window, WINDOWED, QUERIES, BLOCK_N)
        total += tl.sum(end - first)
        earlier += tl.sum(tl.where(sequence < before, end - first, 0))
    return total, earlier


@triton.jit
def _find(
    query_start, context_lens, place, sequences, window, KV_HEADS: tl.constexpr, WINDOWED: tl.constexpr,
    QUERIES: tl.constexpr, BLOCK_N: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """(sequence, tiles of those before it) at a place in the line of work."""
    found, earlier = tl.sum(tl.zeros((SCAN,), tl.int32)), tl.sum(tl.zeros((SCAN,), tl.int32))
    running = earlier
    for base in range(0, sequences, SCAN):
        sequence = base + tl.arange(0, SCAN)
        query_len, context_len = _lengths(query_start, context_lens, sequence, sequences)
        first, end = _tiles(query_len, context_len, window, WINDOWED, QUERIES, BLOCK_N)
        upto = running + tl.cumsum(end - first)
        passed = (upto <= place // KV_HEADS) & (sequence < sequences)
        found += tl.sum(passed.to(tl.int32))
        earlier = tl.maximum(earlier, tl.max(tl.where(passed, upto, 0)))
        running += tl.sum(end - first)
    return found, earlier


@triton.jit(do_not_specialize=["sequences", "window", "table_row"])
def decode(
    q, k_cache, v_cache, query_start, context_lens, block_tables, k_scale, v_scale, out, parts, logs,
    sequences, scale, window, softcap, q_token, q_head, k_block, k_position, k_head, v_block, v_position,
    v_head, table_row, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, QUERIES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr, SCAN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """parts [2 programs, BLOCK_M, DIM_V] and logs [2 programs, BLOCK_M]: where parts of results go."""
    program = tl.program_id(0)
    total, _ = _count_tiles(query_start, context_lens, 0, sequences, window, WINDOWED, QUERIES, BLOCK_N, SCAN)
    work = total.to(tl.int64) * KV_HEADS
    programs = tl.minimum(tl.num_programs(0), work)
    if program >= programs:
        return
    place = (program * work // programs).to(tl.int32)
    stop = ((program + 1) * work // programs).to(tl.int32)
    sequence, earlier = _find(
        query_start, context_lens, place, sequences, window, KV_HEADS, WINDOWED, QUERIES, BLOCK_N, SCAN
    )
    query_len, context_len = _lengths(query_start, context_lens, sequence, sequences)
    first, end = _tiles(query_len, context_len, window, WINDOWED, QUERIES, BLOCK_N)
    head = (place - earlier * KV_HEADS) // (end - first)
    skipped = (place - earlier * KV_HEADS) % (end - first)

    offs_m = tl.arange(0, BLOCK_M)
    offs_dv = tl.arange(0, BLOCK_DV)
    slot = 2 * program
    while place < stop:
        query_len, context_len = _lengths(query_start, context_lens, sequence, sequences)
        first, end = _tiles(query_len, context_len, window, WINDOWED, QUERIES, BLOCK_N)
        count = tl.minimum(end - first - skipped, stop - place)
        if count > 0:
            start = tl.load(query_start + sequence)
            queries, qk_scale = load_queries(
                q, start, query_len, head, q_token, q_head, k_scale is not None, GROUP, DIM, BLOCK_M, BLOCK_D
            )
            qk_scale *= scale
            if k_scale is not None:
                qk_scale *= tl.load(k_scale + head) * code_unit(k_cache.dtype.element_ty)
            if not CAPPED:
                qk_scale *= LOG2_E
            acc, m_i, l_i = attend(
                queries,
                qk_scale,
                tl.zeros((BLOCK_M, BLOCK_DV), tl.float32),
                tl.full((BLOCK_M,), float("-inf"), tl.float32),
                tl.zeros((BLOCK_M,), tl.float32),
                first + skipped,
                first + skipped + count,
                context_len - tl.maximum(query_len - offs_m // GROUP, 1),
                context_len,
                k_cache + head * k_head,
                v_cache + head * v_head,
                block_tables + sequence.to(tl.int64) * table_row,
                k_block, k_position, v_block, v_position, window, softcap,
                True, WINDOWED, CAPPED, BLOCK_SIZE, DIM, DIM_V, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
            out_scale = 1.0 / tl.where(l_i > 0, l_i, 1.0)
            if v_scale is not None:
                out_scale *= tl.load(v_scale + head) * code_unit(v_cache.dtype.element_ty)
            acc *= out_scale[:, None]
            mask = (offs_m // GROUP < query_len)[:, None] & (offs_dv < DIM_V)[None, :]
            if count == end - first:
                offs_row = (start + offs_m // GROUP) * (KV_HEADS * GROUP) + head * GROUP + offs_m % GROUP
                out_ptrs = out + offs_row[:, None] * DIM_V + offs_dv[None, :]
                tl.store(out_ptrs, rounded(acc, out.dtype.element_ty), mask=mask)
            else:
                offs_row = slot.to(tl.int64) * BLOCK_M + offs_m
                tl.store(parts + offs_row[:, None] * DIM_V + offs_dv[None, :], acc, mask=mask)
                tl.store(logs + offs_row, m_i + tl.log2(tl.where(l_i > 0, l_i, 1.0)))
            slot = 2 * program + 1
            place += count
        skipped = 0
        head = tl.where(count > 0, head + 1, KV_HEADS)
        sequence += (head == KV_HEADS).to(tl.int32)
        head = head % KV_HEADS


@triton.jit(do_not_specialize=["sequences", "window", "programs"])
def combine(
    query_start, context_lens, parts, logs, out, sequences, window, programs, GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr, QUERIES: tl.constexpr, DIM_V: tl.constexpr, WINDOWED: tl.constexpr,
    SCAN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Adds up the parts of one query head's result for one token; leaves results that came whole."""
    sequence = tl.program_id(0) // QUERIES
    query = tl.program_id(0) % QUERIES
    member = tl.program_id(1) % GROUP
    head = tl.program_id(1) // GROUP
    query_len, context_len = _lengths(query_start, context_lens, sequence, sequences)
    if query >= query_len:
        return
    first, end = _tiles(query_len, context_len, window, WINDOWED, QUERIES, BLOCK_N)
    if first == end:
        return
    total, earlier = _count_tiles(
        query_start, context_lens, sequence, sequences, window, WINDOWED, QUERIES, BLOCK_N, SCAN
    )
    work = total.to(tl.int64) * KV_HEADS
    programs = tl.minimum(programs, work)
    begin = earlier.to(tl.int64) * KV_HEADS + head * (end - first)
    # Program p takes the work from p * work // programs: the last whose share begins at or before a place.
    first_program = (((begin + 1) * programs - 1) // work).to(tl.int32)
    last_program = (((begin + end - first) * programs - 1) // work).to(tl.int32)
    if first_program == last_program:
        return
    # In the first program's share something else may come before.
    first_slot = 2 * first_program + (first_program * work // programs < begin).to(tl.int32)
    offs_dv = tl.arange(0, BLOCK_DV)
    acc = tl.zeros((BLOCK_DV,), tl.float32)
    m_i = tl.max(tl.full((PARTS,), float("-inf"), tl.float32), 0)
    l_i = tl.sum(tl.zeros((PARTS,), tl.float32), 0)
    for base in range(first_program, last_program + 1, PARTS):
        program = base + tl.arange(0, PARTS)
        mask = program <= last_program
        slot = tl.where(program == first_program, first_slot, 2 * program).to(tl.int64)
        offs_row = slot * BLOCK_M + query * GROUP + member
        log = tl.load(logs + offs_row, mask=mask, other=float("-inf"))
        part = tl.load(
            parts + offs_row[:, None] * DIM_V + offs_dv[None, :],
            mask=mask[:, None] & (offs_dv < DIM_V)[None, :],
            other=0.0,
        )
        m_prev = m_i
        m_i = tl.maximum(m_i, tl.max(log, 0))
        m_safe = tl.where(m_i > float("-inf"), m_i, 0.0)
        p = tl.exp2(log - m_safe)
        alpha = tl.exp2(m_prev - m_safe)
        l_i = l_i * alpha + tl.sum(p, 0)
        acc = acc * alpha + tl.sum(p[:, None] * part, 0)
    start = tl.load(query_start + sequence)
    out_ptrs = out + ((start + query) * (KV_HEADS * GROUP) + head * GROUP + member) * DIM_V + offs_dv
    tl.store(out_ptrs, rounded(acc / l_i, out.dtype.element_ty), mask=offs_dv < DIM_V)
