"""One Triton kernel for every product with weights of few bits: int4, nf4, int8, fp8, one token or thousands.

Layout: codes, scales and zeros in the blocks of `fragments`, which make the product y^T = W x^T.

Bound: with few tokens, the bytes of the codes. At 4.3 TB/s an H200 reads 36 int4 weights per cycle and
multiprocessor, whose 128 lanes so have 3.5 instructions for each; 8-bit weights have 7. With some hundreds of
tokens, the rate of the tensor cores.

Few tokens (K_WARPS = the warps): a program has ROW_BLOCKS blocks of rows, and its warps take turns at the
blocks of columns, so that 16 rows already occupy 8 warps; each has sums of its own, which are added at the
end. Tensor cores multiply even for one token, of the 8 that they take at least: they have time, and fused
multiply-adds would be an instruction per weight, conversions not counted. More tokens (K_WARPS = 0): the
warps share the rows of a tile of BLOCK_M tokens, which wgmma reads from shared memory, the weights from
registers.

Codes and x come through num_stages buffers in shared memory, 16 bytes per lane at a time. Scales multiply the
sums of each group (BLOCK_M / G instructions per weight), or with SCALED_WEIGHTS the weights (1/2), which
suits wider tiles and leaves the sums where the tensor cores add to them.

Instructions per weight, all of the main loop, counted in machine code for sm_90 (Triton 3.6, bfloat16, one
group per block unless said otherwise, no registers spilled):

    int4    1 token, 8 warps share K, ROW_BLOCKS 1, 2, 4        2.8, 2.4, 2.0
            the same with ROW_BLOCKS 2, whole and other zeros   2.8, 3.4
            16 tokens, 8 warps share K, ROW_BLOCKS 2            2.6
            16, 32 tokens, 4 warps, ROW_BLOCKS 8                2.7, 2.8
            64 tokens, 4 warps, ROW_BLOCKS 8, SCALED_WEIGHTS    3.4
            128 tokens, 8 warps, ROW_BLOCKS 8, SCALED_WEIGHTS   4.0, half a tile's time on tensor cores
    nf4     1 token, ROW_BLOCKS 2                               4.1 to 5.0
    int8    1 token, ROW_BLOCKS 2, groups, one per row          3.4, 3.1
    fp8     1 token, ROW_BLOCKS 2, one group per row            3.5
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastserve_kernels.gpu.arithmetic import multiply
from fastserve_kernels.gpu.fragments import ROWS, SLICE, WORDS
from fastserve_kernels.gpu.pair_assembly import power_of_mantissa
from fastserve_kernels.gpu.split_k import store_sums
from fastserve_kernels.gpu.tiles import tile_of
from fastserve_kernels.gpu.unpack import (
    as_tile,
    is_packed,
    less,
    load_codebook,
    multiplied,
    spread_over_rows,
    spread_over_words,
    unpacked,
)

_ROWS, _SLICE, _WORDS = tl.constexpr(ROWS), tl.constexpr(SLICE), tl.constexpr(WORDS)


@triton.jit
def _group_words(words, INDEX: tl.constexpr, GROUPS: tl.constexpr):
    """The words [W, R, 8] of one group among those [W, R, 8 GROUPS] of a block."""
    if GROUPS == 1:
        return words
    elif GROUPS == 2:
        even, odd = tl.split(tl.reshape(words, (words.shape[0], words.shape[1], 8, 2)))
        return odd if INDEX else even
    else:
        even, odd = tl.split(tl.reshape(words, (words.shape[0], words.shape[1], 8, 2, 2)))
        first, second = tl.split(odd if INDEX % 2 else even)
        return second if INDEX // 2 else first


@triton.jit
def _spread_group(
    groups, plane, block, group, GROUPS: tl.constexpr, SOURCE: tl.constexpr, DTYPE: tl.constexpr
):
    """The scales or zeros of one group of blocks [W, R, 1], spread over their words."""
    offs = block * (8 * GROUPS) + tl.arange(0, 8)[None, None, :] * GROUPS + group
    return spread_over_words(tl.load(groups + plane + offs), SOURCE, DTYPE)


@triton.jit
def _multiply(values, x, acc, K_WARPS: tl.constexpr, DTYPE: tl.constexpr):
    """acc + W x^T of a slice: values [W, R, 512] of the weights, x [W, BLOCK_M, 32] or [BLOCK_M, 32]."""
    tile = as_tile(values, DTYPE)
    if K_WARPS:
        return multiply(tile, tl.permute(x, (0, 2, 1)), acc)
    else:
        return multiply(tl.reshape(tile, (tile.shape[1], _SLICE)), tl.permute(x, (1, 0)), acc)


@triton.jit
def _scaled(acc, words, K_WARPS: tl.constexpr, SCALE: tl.constexpr):
    """Sums of a group times its scales in words [W, R, 8]."""
    rows = spread_over_rows(words, SCALE)
    if K_WARPS:
        return acc * rows[:, :, None]
    else:
        return acc * tl.reshape(rows, (rows.shape[1],))[:, None]


@triton.jit(do_not_specialize=["tokens"])
def quantized_linear(
    x, codes, scales, zeros, codebook, bias, residual, y, partial, arrivals, tokens, out_features,
    in_features, x_row, residual_row, row_blocks, blocks, FORMAT: tl.constexpr, SCALE: tl.constexpr,
    GROUPS: tl.constexpr, ZEROS: tl.constexpr, SLICES: tl.constexpr, SCALED_WEIGHTS: tl.constexpr,
    ROW_BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr, K_WARPS: tl.constexpr, SPLITS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """x [tokens, in_features], rows x_row apart; codes [row_blocks, blocks, 512].

    scales: words of two numbers of dtype SCALE, for GROUPS groups in a block; if that is 0, [out_features]
    float32. zeros: ZEROS planes of words of two numbers of x's dtype, as `pack_zeros` makes them.
    EVEN: the blocks of columns are full, and as many for each warp of each split. Where they are not, a warp
    reads the last block again and multiplies it by zeros in place of x.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    WARPS: tl.constexpr = K_WARPS if K_WARPS else 1
    BLOCK_GROUPS: tl.constexpr = GROUPS if GROUPS else 1
    GROUP_SLICES: tl.constexpr = SLICES // BLOCK_GROUPS
    BLOCK_K: tl.constexpr = SLICES * _SLICE
    SCALED_SUMS: tl.constexpr = GROUPS > 0 and not SCALED_WEIGHTS
    row_tile, token_tile = tile_of(
        tl.program_id(0), tl.cdiv(row_blocks, ROW_BLOCKS), tl.cdiv(tokens, BLOCK_M)
    )
    split = tl.program_id(1) if SPLITS > 1 else 0
    row_block = tl.minimum(row_tile * ROW_BLOCKS + tl.arange(0, ROW_BLOCKS), row_blocks - 1)[None, :, None]
    offs_m = token_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    x_ptrs = x + offs_m.to(tl.int64)[:, None] * x_row
    mask_m = (offs_m < tokens)[:, None]
    steps = tl.cdiv(blocks, WARPS * SPLITS)
    last = blocks - 1
    first = split * steps * WARPS + tl.arange(0, WARPS)[:, None, None]
    shape: tl.constexpr = (WARPS, ROW_BLOCKS * _ROWS, BLOCK_M) if K_WARPS else (ROW_BLOCKS * _ROWS, BLOCK_M)

    acc = tl.zeros(shape, tl.float32)
    table = load_codebook(codebook, DTYPE) if FORMAT == "nf4" else codebook
    offset = tl.full((1, 1, 1), power_of_mantissa(DTYPE) + 8.0, DTYPE if is_packed(DTYPE) else tl.float32)
    group_words = tl.arange(0, 8 * BLOCK_GROUPS)[None, None, :]
    if SCALED_SUMS:
        scale_words = tl.load(
            scales + (row_block * blocks + tl.minimum(first, last)) * (8 * GROUPS) + group_words
        )
    for step in range(steps):
        column_block = first + step * WARPS
        block = row_block * blocks + (column_block if EVEN else tl.minimum(column_block, last))
        words = tl.load(codes + block * _WORDS + tl.arange(0, _WORDS)[None, None, :])
        if SCALED_SUMS:
            next_block = row_block * blocks + tl.minimum(column_block + WARPS, last)
            next_words = tl.load(scales + next_block * (8 * GROUPS) + group_words)
        for group in tl.static_range(BLOCK_GROUPS):
            zero = _spread_group(zeros, 0, block, group, BLOCK_GROUPS, DTYPE, DTYPE) if ZEROS else offset
            group_acc = tl.zeros(shape, tl.float32) if SCALED_SUMS else acc
            for i in tl.static_range(GROUP_SLICES):
                values = unpacked(words, zero, table, group * GROUP_SLICES + i, FORMAT, ZEROS, DTYPE)
                if ZEROS == 2:
                    plane = row_blocks * blocks * (8 * BLOCK_GROUPS)
                    rest = _spread_group(zeros, plane, block, group, BLOCK_GROUPS, DTYPE, DTYPE)
                    values = less(values, rest, DTYPE)
                if GROUPS and SCALED_WEIGHTS:
                    factor = _spread_group(scales, 0, block, group, GROUPS, SCALE, DTYPE)
                    values = multiplied(values, factor, DTYPE)
                slice_start = (group * GROUP_SLICES + i) * _SLICE
                if K_WARPS:
                    offs_k = column_block * BLOCK_K + (slice_start + tl.arange(0, _SLICE)[None, None, :])
                    mask = mask_m[None, :, :] if EVEN else mask_m[None, :, :] & (offs_k < in_features)
                    x_tile = tl.load(x_ptrs[None, :, :] + offs_k, mask=mask, other=0.0)
                else:
                    offs_k = (split * steps + step) * BLOCK_K + (slice_start + tl.arange(0, _SLICE)[None, :])
                    mask = mask_m if EVEN else mask_m & (offs_k < in_features)
                    x_tile = tl.load(x_ptrs + offs_k, mask=mask, other=0.0)
                group_acc = _multiply(values, x_tile, group_acc, K_WARPS, DTYPE)
            if SCALED_SUMS:
                acc += _scaled(group_acc, _group_words(scale_words, group, GROUPS), K_WARPS, SCALE)
            else:
                acc = group_acc
        if SCALED_SUMS:
            scale_words = next_words

    total = tl.sum(acc, 0) if K_WARPS else acc
    offs_n = row_tile * (ROW_BLOCKS * _ROWS) + tl.arange(0, ROW_BLOCKS * _ROWS)
    if GROUPS == 0:
        total *= tl.load(scales + offs_n, mask=offs_n < out_features, other=0.0)[:, None]
    store_sums(
        total, y, bias, residual, partial, arrivals, offs_n, offs_m, out_features, tokens, residual_row,
        tl.program_id(0), split, SPLITS,
    )  # fmt: skip
