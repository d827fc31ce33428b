"""The order in which quantized weights lie in memory: that in which tensor cores take them.

The Triton kernels compute y^T = W x^T, so that the weights are the left factor of a product, which tensor
cores read from registers, and tokens the right one, of which there may be as few as 8. A fragment is what one
instruction takes: 16 rows by 16 columns, of which lane 4 r + c of a warp holds columns 2 c, 2 c + 1, 2 c + 8
and 2 c + 9 of rows r and r + 8 (mma.sync m16n8k16 and wgmma alike).

A block is 16 rows by 32 columns for each code in a 16-bit word: 128 columns of 4-bit codes, 64 of 8-bit ones.
It has 512 words, and word i holds, from the low bits on, the code of the same place in each of its slices of
32 columns; a slice is two fragments. In a block the words are ordered as

    half of the slice (2), r (8), c (4), columns 8 apart (2), rows 8 apart (2), neighbouring columns (2)

so that a lane's 8 words of a fragment are 16 adjacent bytes, a warp's 512; one shift and mask of a register
of two words gives a slice's pair of codes, in the register where the instruction wants it; and nothing moves
from one lane to another. Blocks are ordered by row, then by column: int16 [ceil(N / 16), ceil(K / block
columns), 512]. Rows and columns beyond N and K are filled with the code 0.

Scales and zeros follow the same order: [ceil(N / 16), ceil(K / block columns), 8, groups in a block, 2],
where the last dimension is the rows r and r + 8, so that a lane's two are one word. A group that is wider
than a block is repeated. One group per row, G = K, has scales [N] float32, which multiply the finished sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 16
"""Rows of a block."""
SLICE = 32
"""Columns of a block that are multiplied at a time."""
WORDS = 512
"""Words of a block."""


def block_columns(bits: int) -> int:
    """Columns of a block of codes of so many bits."""
    return SLICE * 16 // bits


def blocks_of(size: int, each: int) -> int:
    """Blocks that hold so many rows or columns."""
    return -(-size // each)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes [N, K] of any integer dtype, of which the low bits count, as blocks [., ., 512] int16."""
    columns = block_columns(bits)
    padded = _pad(codes.to(torch.int32), columns) & (1 << bits) - 1
    rows, blocks = padded.shape[0] // ROWS, padded.shape[1] // columns
    parts = padded.view(rows, 2, 8, blocks, 16 // bits, 2, 2, 4, 2)
    # rows 8 apart, r, block, slice, half, columns 8 apart, c, neighbours: to the order above, the slice last
    ordered = parts.permute(0, 3, 5, 2, 7, 6, 1, 8, 4).reshape(rows, blocks, WORDS, 16 // bits)
    shifts = torch.arange(0, 16, bits, dtype=torch.int32, device=codes.device)
    words = (ordered << shifts).sum(-1, dtype=torch.int32)
    return torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16)


def pack_groups(values: Tensor, group_size: int, bits: int) -> Tensor:
    """Scales or zeros [N, K / G] in the order of the blocks; of their own dtype."""
    columns = block_columns(bits)
    if values.shape[1] == 1:
        values, in_block = values.expand(-1, blocks_of(group_size, columns)), 1
    else:
        values, in_block = (
            values.repeat_interleave(max(group_size // columns, 1), dim=1),
            max(columns // group_size, 1),
        )
    padded = _pad(values, in_block)
    rows, blocks = padded.shape[0] // ROWS, padded.shape[1] // in_block
    return padded.view(rows, 2, 8, blocks, in_block).permute(0, 3, 2, 4, 1).contiguous()


def _pad(values: Tensor, columns: int) -> Tensor:
    right, below = -values.shape[1] % columns, -values.shape[0] % ROWS
    return torch.nn.functional.pad(values, (0, right, 0, below)) if right or below else values.contiguous()


def half_width(scales: Tensor) -> Tensor:
    """Scales in 16 bits: as they are, else float16 where that has them at full precision, else bfloat16."""
    if scales.dtype != torch.float32:
        return scales
    limits = torch.finfo(torch.float16)
    size = scales.abs()
    fits = bool(((size <= limits.max) & ((size >= limits.tiny) | (size == 0))).all())
    return scales.to(torch.float16 if fits else torch.bfloat16)
