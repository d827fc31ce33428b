"""Block-sparse weights: a linear that reads, multiplies and waits for kept blocks only.

Layout: blocks [B, bn, bk] as in `BlockSparse`, in the activations' dtype, so that 16 bytes a thread are one
row's neighbours, and a program's blocks are one run of memory. Bound: with few tokens the bytes of the kept
blocks, of which an H200 reads one weight in the time of 14 instructions, with many the tensor cores. A block
is multiplied as it is: 1.1 instructions per weight, copies of 16 bytes, loads and products (64 x 64, 8
tokens).

A program multiplies one run of blocks of one block row, several blocks at a time where these are small, by
the columns of x that belong to them, which come out of the L2 cache: x is small. Block rows are of unequal
length, so `prepare` cuts them into runs of nearly equal length, of which there are as many as fill the GPU;
a program looks its run up in that list. The runs of one block row are added up by the last of them to
finish, in order (as in `split_k`). With many tokens there are programs enough: there a run is a whole block
row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastserve_kernels.formats.prepared import BlockSparseArguments, Prepared
from fastserve_kernels.formats.sparse import BlockSparse
from fastserve_kernels.formats.weight import Weight
from fastserve_kernels.gpu.arithmetic import multiply
from fastserve_kernels.gpu.launch import Config, Launch
from fastserve_kernels.gpu.linear_call import Added, LinearInputs, call_linear, linear_cost
from fastserve_kernels.gpu.operator import Cost, Operator, Shape
from fastserve_kernels.gpu.quantized_linear import check_format
from fastserve_kernels.gpu.split_k import MAX_TILES, arrivals, store_sums

_WARPS_WANTED = 2112
"""That multiply at once where K is split: 16 on each of an H200's 132 multiprocessors."""
_LEAST_RUN = 8192
"""Numbers in a run that is still worth a program of its own."""


@triton.jit(do_not_specialize=["M"])
def block_sparse(
    x, blocks, runs, columns, bias, residual, out, partial, arrivals, M, N, K, first_run,
    BN: tl.constexpr, BK: tl.constexpr, TOGETHER: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """runs: [., 5] int32: block row, first block, end block, number of the run in its row, runs of the row;
    those of a row adjoin. x: [M, K]. partial: [tiles of M, runs, BN, BLOCK_M] float32, or None if no row has
    more than one. grid: (tiles of M, runs), of the list from `first_run` on.
    """
    run = tl.program_id(1)
    fields = runs + (first_run + run) * 5
    row, first, end = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2)
    part, parts = tl.load(fields + 3), tl.load(fields + 4)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_bn = tl.arange(0, BN)
    offs_bk = tl.arange(0, TOGETHER * BK)
    acc = tl.zeros((BN, BLOCK_M), tl.float32)
    for start in range(first, end, TOGETHER):
        block = start + offs_bk // BK
        mask_k = block < end
        column = tl.load(columns + block, mask=mask_k, other=0) * BK + offs_bk % BK
        w_offs = block.to(tl.int64)[None, :] * (BN * BK) + offs_bn[:, None] * BK + (offs_bk % BK)[None, :]
        w = tl.load(blocks + w_offs, mask=mask_k[None, :], other=0.0)
        mask = mask_k[:, None] & (offs_m < M)[None, :]
        x_tile = tl.load(x + offs_m[None, :] * K + column[:, None], mask=mask, other=0.0)
        acc = multiply(w, x_tile, acc)

    last = True
    if partial is not None:  # known when compiled  # noqa: SIM102
        if parts > 1:
            size: tl.constexpr = BN * BLOCK_M
            offs = offs_bn[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
            first_part = (tl.program_id(0) * tl.num_programs(1) + run - part).to(tl.int64) * size + offs
            tl.store(partial + first_part + part * size, acc)
            tl.debug_barrier()
            counter = arrivals + tl.program_id(0) * (N // BN) + row
            last = tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1
            if last:
                acc = tl.zeros((BN, BLOCK_M), tl.float32)
                for other in range(parts):
                    acc += tl.load(partial + first_part + other * size, cache_modifier=".cg")
                tl.store(counter, 0)
    if last:
        offs_n = row * BN + offs_bn
        store_sums(acc, out, bias, residual, None, None, offs_n, offs_m, N, M, N, 0, 0, 1)


def prepare(weight: Weight, device: torch.device, dtype: torch.dtype) -> Prepared:
    """Packs a `BlockSparse`: in the place of row_starts the runs: whole rows, and, if any is cut, the cut.

    Raises ValueError if it is another format, or the device cannot multiply by it.
    """
    weight = check_format(weight, BlockSparse, device)
    count, rows, columns = weight.blocks.shape
    starts = weight.row_starts.cpu()
    wanted = _WARPS_WANTED // _warps(rows)
    length = max(-(-count // wanted), _LEAST_RUN // (rows * columns), 1)
    whole, cut = _runs(starts, max(count, 1)), _runs(starts, length)
    runs = whole if len(whole) == len(cut) else torch.cat((whole, cut))
    blocks = weight.blocks.to(device, dtype).contiguous()
    arguments = (blocks, runs.to(device), weight.columns.to(device), weight.out_features)
    return Prepared(weight.operator, arguments, weight.out_features, weight.in_features)


def _warps(rows: int) -> int:
    """Warps of a program for so many rows of the weight and few tokens: 32 rows per warp."""
    return max(rows // 32, 1)


def _runs(starts: Tensor, length: int) -> Tensor:
    """The block rows, from starts[i] to starts[i + 1], cut into runs of at most `length` blocks: [runs, 5].

    An empty block row has one run, of no block: its outputs must be written too.
    """
    counts = starts.diff().long()
    parts = (-(-counts // length)).clamp(min=1)
    row = torch.arange(len(counts)).repeat_interleave(parts)
    first_run = parts.cumsum(0) - parts
    part = torch.arange(len(row)) - first_run[row]
    begin, count, of = starts[:-1].long()[row], counts[row], parts[row]
    fields = (row, begin + part * count // of, begin + (part + 1) * count // of, part, of)
    return torch.stack(fields, dim=1).to(torch.int32)


def plan(
    x: Tensor, weight: BlockSparseArguments, added: Added, out: Tensor, *, config: Config
) -> list[Launch]:
    """x [M, K] and out [M, N] contiguous, of the blocks' dtype; the weight as `prepare` made it."""
    (blocks, runs, columns, _), (bias, residual) = weight, added
    config = _FLOAT32 if x.dtype == torch.float32 else config
    m, n = out.shape
    _, rows, depth = blocks.shape
    block_m = config.constants["BLOCK_M"]
    m_tiles, block_rows = -(-m // block_m), n // rows
    cut = bool(config.constants["CUT"]) and len(runs) > block_rows and m_tiles * block_rows <= MAX_TILES
    count = len(runs) - block_rows if cut else block_rows
    partial = x.new_empty(m_tiles * count * rows * block_m, dtype=torch.float32) if cut else None
    return [
        Launch(
            block_sparse,
            (m_tiles, count),
            {
                "x": x,
                "blocks": blocks,
                "runs": runs,
                "columns": columns,
                "bias": bias,
                "residual": residual,
                "out": out,
                "partial": partial,
                "arrivals": arrivals(x.device) if cut else None,
                "M": m,
                "N": n,
                "K": x.shape[1],
                "first_run": block_rows if cut else 0,
            },
            {
                "BN": rows,
                "BK": depth,
                "TOGETHER": max(config.constants["DEPTH"] // depth, 1),
                "BLOCK_M": block_m,
            },
            config.num_warps,
            config.num_stages,
        )
    ]


_FLOAT32 = Config({"BLOCK_M": 16, "DEPTH": 16, "CUT": 1}, num_warps=8, num_stages=1)
"""For float32, which no tensor core takes unshortened."""
_SHARED_BYTES = 160 * 1024
"""That a program may have on every GPU that has tensor cores for bfloat16."""


def candidates(shape: Shape) -> list[Config]:
    """Few tokens: small tiles, rows cut into runs; many: whole rows, and a tile of tokens.

    As a block's column is looked up before x is read there, two stages of the pipeline are one tile on its
    way: 7 stages are three.
    """
    m, rows = shape["m"], shape["block_n"]
    most = 128 if rows >= 64 else 64
    block_m = next(size for size in (8, 16, 32, 64, 128) if m <= size or size == most)
    warps = _warps(rows)
    if block_m <= 16:
        tried = [(warps, 128, 7), (warps, 64, 7), (warps, 64, 9), (warps, 128, 5), (2 * warps, 128, 7)]
    else:
        warps = min(max(rows * block_m // 1024, 1), 8)
        tried = [(warps, 64, 5), (warps, 64, 7), (warps, 128, 5), (max(warps // 2, 1), 64, 5)]
    tried = [
        (warps, depth, stages)
        for warps, depth, stages in dict.fromkeys(tried)
        if stages // 2 * 2 * max(depth, shape["block_k"]) * (rows + block_m) <= _SHARED_BYTES
    ]
    cuts = (1, 0) if block_m <= 64 else (0,)
    return [
        Config({"BLOCK_M": block_m, "DEPTH": depth, "CUT": cut}, warps, stages)
        for cut in cuts
        for warps, depth, stages in tried
    ]


def linear_block_sparse(
    x: Tensor, weight: BlockSparseArguments, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """`reference.linear_block_sparse` on a GPU."""
    blocks, _, _, out_features = weight
    shape = {
        "m": x.shape[0],
        "n": out_features,
        "k": x.shape[1],
        "block_n": blocks.shape[1],
        "block_k": blocks.shape[2],
        "percent": max(round(100 * blocks.numel() / (out_features * x.shape[1])), 1),
    }
    return call_linear(OPERATORS[0], shape, x, weight, (bias, residual))


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> LinearInputs:
    m, n, k = shape["m"], shape["n"], shape["k"]
    weight = torch.randn(n, k, dtype=dtype, device=device)
    packed = BlockSparse.pack(weight, (shape["block_n"], shape["block_k"]), shape["percent"] / 100)
    x = torch.randn(m, k, dtype=dtype, device=device)
    return (x, prepare(packed, device, dtype).arguments, (None, None), x.new_empty(m, n))


def _reference(x: Tensor, weight: BlockSparseArguments, *__: object) -> Tensor:
    blocks, runs, columns, out_features = weight
    rows = out_features // blocks.shape[1]
    starts = torch.cat((runs[:rows, 1], runs[rows - 1 : rows, 2]))
    return x.float() @ BlockSparse(blocks, starts, columns, (out_features, x.shape[1])).dequantize().t()


def _cost(shape: Shape, dtype: torch.dtype) -> Cost:
    kept = shape["n"] * shape["k"] * shape["percent"] // 100
    indices = 4 * kept // (shape["block_n"] * shape["block_k"])
    return linear_cost(shape, dtype, kept * dtype.itemsize + indices, kept)


OPERATORS = (
    Operator(
        name="linear_block_sparse",
        inputs=_inputs,
        plan=plan,
        candidates=candidates,
        cost=_cost,
        compiled_shapes=tuple(
            {"m": m, "n": 16 * size, "k": 16 * size, "block_n": size, "block_k": size, "percent": 50}
            for m in (8, 16, 64, 128)
            for size in (16, 64, 128)
        ),
        reference=_reference,
    ),
)
