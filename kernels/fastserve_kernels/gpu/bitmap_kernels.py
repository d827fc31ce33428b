"""The two kernels of weights of which any may be left out: one for a few tokens, one for more.

At half density the dense 16-bit weight has 2 bytes per weight, the bitmap 1.13. What costs is to find out
where a number belongs: an H200 has about 8 instructions for each weight in the time in which 1.13 bytes
arrive, and to spread each number out to its place in the dense row takes more. So the numbers stay where
they are:

`bitmap_few` reads the numbers in lists of eight, 16 bytes, with one word that has the columns of the eight:
the first in 11 bits, relative to a segment of 2048 columns, and seven steps to the next of 3 bits each.
(Where a step is longer than 7, a zero is put on the way: one number in 128.) A thread takes a list, and for
each number fetches x at its column, which the L1 cache has. 1.26 bytes and 6.3 instructions per weight at
half density and one token (machine code for sm_90), 3.5 more for each further token.

`bitmap_many` spreads out, as each number must serve many tokens: for 32 columns of a row a record of 64 bits
has their mask, and in the upper half where their numbers begin. A thread whose bit is set counts the bits
below it and fetches that number, through the L1 cache; tensor cores multiply the tile. 1.27 bytes, 13.7
instructions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastserve_kernels.gpu.arithmetic import INTERPRETED, multiply
from fastserve_kernels.gpu.split_k import store_sums

SEGMENT_BITS = tl.constexpr(11)
STEP_BITS = tl.constexpr(3)
_SEGMENT, _SEGMENT_MASK, _STEP_MASK = tl.constexpr(2048), tl.constexpr(2047), tl.constexpr(7)


@triton.jit
def _eight(lists):
    """The columns of [P, 8] as eight tensors [P], each in the thread that has it."""
    even, odd = tl.split(tl.reshape(lists, (lists.shape[0], 2, 2, 2)))
    n04_n02, n46 = tl.split(even)
    n15, n37 = tl.split(odd)
    n0, n4 = tl.split(n04_n02)
    n2, n6 = tl.split(n46)
    n1, n5 = tl.split(n15)
    n3, n7 = tl.split(n37)
    return n0, n1, n2, n3, n4, n5, n6, n7


@triton.jit
def _load_lists(values, words, number, end):
    """(numbers [P, 8], words [P]) of lists; 0, at the first column of the segment, from `end` on."""
    mask = number < end
    offs = number.to(tl.int64)[:, None] * 8 + tl.arange(0, 8)[None, :]
    numbers = tl.load(values + offs, mask=mask[:, None], other=0.0, eviction_policy="evict_first")
    return numbers, tl.load(words + number, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["M"])
def bitmap_few(
    x, values, starts, words, bias, residual, out, partial, arrivals, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LANES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """starts: [segments N + 1] int32, the first list of each row of each segment. values: [lists, 8]. words:
    [lists] int32. LANES lists of each of BLOCK_N rows are taken at a time.

    grid: (tiles of M, tiles of N, SPLITS of the segments).
    """
    thread = tl.arange(0, BLOCK_N * LANES)
    row = tl.program_id(1) * BLOCK_N + thread // LANES
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    segments = tl.cdiv(K, _SEGMENT)
    split = tl.program_id(2)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for segment in range(split * segments // SPLITS, (split + 1) * segments // SPLITS):
        first = tl.load(starts + segment * N + row, mask=row < N, other=0)
        end = tl.load(starts + segment * N + row + 1, mask=row < N, other=0)
        longest = tl.max(end - first)
        first += thread % LANES
        segment_ptr = x + segment * _SEGMENT
        lane_acc = tl.zeros((BLOCK_N * LANES, BLOCK_M), tl.float32)
        numbers, word = _load_lists(values, words, first, end)
        for taken in range(0, longest, LANES):
            next_numbers, next_word = _load_lists(values, words, first + taken + LANES, end)
            eight = _eight(numbers)
            column = word & _SEGMENT_MASK
            for i in tl.static_range(8):
                if i > 0:
                    column += (word >> (SEGMENT_BITS + STEP_BITS * (i - 1))) & _STEP_MASK
                offs = offs_m[None, :] * K + column.to(tl.uint32)[:, None]
                x_there = tl.load(segment_ptr + offs, mask=(offs_m < M)[None, :], other=0.0)
                lane_acc += eight[i].to(tl.float32)[:, None] * x_there.to(tl.float32)
            numbers, word = next_numbers, next_word
        acc += tl.sum(tl.reshape(lane_acc, (BLOCK_N, LANES, BLOCK_M)), axis=1)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    store_sums(
        acc, out, bias, residual, partial, arrivals, offs_n, offs_m, N, M, N,
        tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), split, SPLITS,
    )  # fmt: skip


@triton.jit
def _bits_below(mask, columns):
    """The number of bits set below each column, [R, 32], in masks [R, 1] of 32 columns."""
    if INTERPRETED:
        bits = (mask >> columns) & 1
        below = tl.cumsum(bits, axis=1) - bits
    else:
        lower = mask & ((1 << columns) - 1)
        below = tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [lower], tl.int32, is_pure=True, pack=1)
    return below


@triton.jit(do_not_specialize=["M"])
def bitmap_many(
    x, values, records, bias, residual, out, partial, arrivals, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """records: [ceil(K / 32), N] int64: the mask of 32 columns, above it the place in values of their first.

    grid: (tiles of M, tiles of N, SPLITS).
    """
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, 32)
    steps = tl.cdiv(K, 32)
    split = tl.program_id(2)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(split * steps // SPLITS, (split + 1) * steps // SPLITS):
        record = tl.load(records + step * N + offs_n, mask=offs_n < N, other=0)[:, None]
        bitmask = record.to(tl.int32)
        value_offs = (record >> 32).to(tl.int32) + _bits_below(bitmask, columns[None, :])
        kept = ((bitmask >> columns[None, :]) & 1) != 0
        w = tl.load(values + value_offs, mask=kept, other=0.0)
        offs_k = step * 32 + columns
        mask = (offs_k < K)[:, None] & (offs_m < M)[None, :]
        x_tile = tl.load(x + offs_m.to(tl.int64)[None, :] * K + offs_k[:, None], mask=mask, other=0.0)
        acc = multiply(w, x_tile, acc)
    store_sums(
        acc, out, bias, residual, partial, arrivals, offs_n, offs_m, N, M, N,
        tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), split, SPLITS,
    )  # fmt: skip
