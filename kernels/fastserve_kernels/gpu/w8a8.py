"""`linear_w8a8`: int8 weights times activations that are rounded to int8 as well, token by token.

Two launches. `quantize_tokens` takes a token per program, reads it twice, the second time from a cache, and
writes it as int8 with its step, max|x| / 127. `w8a8_linear` multiplies int8 by int8 into int32 on tensor
cores, y^T = W x^T, so that the weights are the side of which these want 64 rows, and there may be few tokens;
at the end the sums are multiplied by the scale of the row and the step of the token.

Layout: the values as they are, [N, K], the columns filled up with zeros to a multiple of 16. Both factors
come to shared memory 16 bytes per lane at a time and are multiplied from there: no instruction touches a
value.

Bound: the bytes of the weights up to some hundreds of tokens (an H200 has 460 int8 operations for each byte),
then the tensor cores' int8 rate, twice that of bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastserve_kernels.formats import W8A8, Weight
from fastserve_kernels.formats.prepared import Prepared, W8A8Arguments
from fastserve_kernels.gpu.fragments import blocks_of
from fastserve_kernels.gpu.launch import Argument, Config, Launch, launch_all
from fastserve_kernels.gpu.linear_call import Added, LinearInputs, rows_contiguous
from fastserve_kernels.gpu.operator import Cost, Operator, Shape
from fastserve_kernels.gpu.quantized_linear import check_device
from fastserve_kernels.gpu.split_k import MAX_TILES, arrivals, partial_sums, store_sums
from fastserve_kernels.gpu.tiles import tile_of
from fastserve_kernels.gpu.tuning import config_for

ALIGNMENT = 16
"""Columns that a row is filled up to."""
BLOCK = 4096
"""Columns that `quantize_tokens` reads at a time."""
MULTIPROCESSORS = 132
SHARED_BYTES = 160 * 1024
"""Shared memory that a program may take, on an A100 too."""
LARGE_TILE = 128 * 256
"""Sums that leave no registers to add up those of other programs."""
LARGEST = tl.constexpr(127.0)
ROUNDING = tl.constexpr(1.5 * 2**23)
"""Added to a small float32 and subtracted again it leaves the nearest whole number, of two the even one."""


@triton.jit
def quantize_tokens(x, quantized, steps, in_features, width, x_row, BLOCK: tl.constexpr):
    """quantized [T, width] int8, zeros beyond in_features; steps [T] float32."""
    token = tl.program_id(0)
    x_ptr = x + token.to(tl.int64) * x_row
    absmax = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, in_features, BLOCK):
        offs_k = first + tl.arange(0, BLOCK)
        values = tl.load(x_ptr + offs_k, mask=offs_k < in_features, other=0.0).to(tl.float32)
        absmax = tl.maximum(absmax, tl.abs(values))
    scale = tl.max(absmax, 0) / LARGEST
    tl.store(steps + token, scale)
    divisor = tl.where(scale > 0, scale, 1.0)
    for first in range(0, width, BLOCK):
        offs_k = first + tl.arange(0, BLOCK)
        values = tl.load(x_ptr + offs_k, mask=offs_k < in_features, other=0.0).to(tl.float32)
        rounded_values = (tl.div_rn(values, divisor) + ROUNDING) - ROUNDING
        tl.store(
            quantized + token.to(tl.int64) * width + offs_k, rounded_values.to(tl.int8), mask=offs_k < width
        )


@triton.jit(do_not_specialize=["tokens"])
def w8a8_linear(
    quantized, steps, values, scales, bias, residual, y, partial, arrivals, tokens, out_features, width,
    residual_row, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """EVEN: the columns of a split are a multiple of BLOCK_K."""
    row_tile, token_tile = tile_of(tl.program_id(0), tl.cdiv(out_features, BLOCK_N), tl.cdiv(tokens, BLOCK_M))
    split = tl.program_id(1)
    offs_n = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = token_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = (offs_m < tokens)[:, None]
    w_ptrs = values + tl.minimum(offs_n, out_features - 1).to(tl.int64)[:, None] * width
    x_ptrs = quantized + offs_m.to(tl.int64)[:, None] * width
    k_tiles = tl.cdiv(width, BLOCK_K * SPLITS)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for k_tile in range(k_tiles):
        offs_k = (split * k_tiles + k_tile) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        if EVEN:
            weight = tl.load(w_ptrs + offs_k)
            x_tile = tl.load(x_ptrs + offs_k, mask=mask_m, other=0)
        else:
            weight = tl.load(w_ptrs + offs_k, mask=offs_k < width, other=0)
            x_tile = tl.load(x_ptrs + offs_k, mask=mask_m & (offs_k < width), other=0)
        acc = tl.dot(weight, tl.permute(x_tile, (1, 0)), acc, out_dtype=tl.int32)
    scale = tl.load(scales + offs_n, mask=offs_n < out_features, other=0.0)
    x_scale = tl.load(steps + offs_m, mask=offs_m < tokens, other=0.0)
    store_sums(
        acc.to(tl.float32) * scale[:, None] * x_scale[None, :], y, bias, residual, partial, arrivals, offs_n,
        offs_m, out_features, tokens, residual_row, tl.program_id(0), split, SPLITS,
    )  # fmt: skip


def prepare(weight: Weight, device: torch.device, dtype: torch.dtype) -> Prepared:
    """Raises ValueError if the GPU is too old."""
    check_device(weight.operator, device)
    arguments = _pack(weight.to(device))
    return Prepared(weight.operator, arguments, weight.out_features, weight.in_features)


def _pack(weight: Weight) -> W8A8Arguments:
    assert isinstance(weight, W8A8)
    values = torch.nn.functional.pad(weight.values, (0, -weight.in_features % ALIGNMENT))
    return (values.contiguous(), weight.scales.contiguous(), weight.out_features)


def linear_w8a8(x: Tensor, weight: W8A8Arguments, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """`reference.linear_w8a8` on a GPU."""
    _, _, out_features = weight
    y = x.new_empty(x.shape[0], out_features)
    if x.shape[0] == 0:
        return y
    x, bias, residual = rows_contiguous(x, bias, residual)
    shape = {"m": triton.next_power_of_2(x.shape[0]), "n": out_features, "k": x.shape[1]}
    config = config_for(W8A8_LINEAR, shape, x.device)
    launch_all(plan(x, weight, (bias, residual), y, config=config))
    return y


def plan(x: Tensor, weight: W8A8Arguments, added: Added, y: Tensor, *, config: Config) -> list[Launch]:
    """The launches for x [T, K] whose rows are contiguous, into y [T, N]."""
    (values, scales, out_features), (bias, residual) = weight, added
    sizes = config.constants
    tokens, in_features = x.shape
    width, splits = values.shape[1], sizes["SPLITS"]
    quantized = torch.empty(tokens, width, dtype=torch.int8, device=x.device)
    steps = torch.empty(tokens, dtype=torch.float32, device=x.device)
    rounding: dict[str, Argument] = {
        "x": x,
        "quantized": quantized,
        "steps": steps,
        "in_features": in_features,
        "width": width,
        "x_row": x.stride(0),
    }
    product: dict[str, Argument] = {
        "quantized": quantized,
        "steps": steps,
        "values": values,
        "scales": scales,
        "bias": bias,
        "residual": residual,
        "y": y,
        "partial": partial_sums(splits, tokens, out_features, x.device),
        "arrivals": None if splits == 1 else arrivals(x.device),
        "tokens": tokens,
        "out_features": out_features,
        "width": width,
        "residual_row": 0 if residual is None else residual.stride(0),
    }
    tiles = blocks_of(out_features, sizes["BLOCK_N"]) * blocks_of(tokens, sizes["BLOCK_M"])
    even = width % (sizes["BLOCK_K"] * splits) == 0
    return [
        Launch(quantize_tokens, (tokens,), rounding, {"BLOCK": BLOCK}, num_warps=8),
        Launch(
            w8a8_linear,
            (tiles, splits),
            product,
            {**sizes, "EVEN": even},
            config.num_warps,
            config.num_stages,
        ),
    ]


def candidates(shape: Shape) -> list[Config]:
    """Tiles as wide as there are tokens; first those that give every multiprocessor two programs."""
    found = []
    for rows, tokens, columns, warps, stages in _tiles(shape["m"]):
        tiles = blocks_of(shape["n"], rows) * blocks_of(shape["m"], tokens)
        for splits in (1, 2, 4, 8):
            few = tiles * splits <= 4 * MULTIPROCESSORS and tiles <= MAX_TILES and rows * tokens < LARGE_TILE
            if splits == 1 or (few and shape["k"] >= splits * columns):
                sizes = {"BLOCK_N": rows, "BLOCK_M": tokens, "BLOCK_K": columns, "SPLITS": splits}
                found.append((abs(tiles * splits - 2 * MULTIPROCESSORS), Config(sizes, warps, stages)))
    first, *others = (config for _, config in sorted(found, key=lambda pair: pair[0]))
    return [first, *others][:24]


def _tiles(tokens: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(rows, tokens, columns, warps, stages)"""
    width = min(max(16, triton.next_power_of_2(tokens)), 256)
    if width <= 64:
        for columns, stages in ((128, 4), (256, 3), (256, 4)):
            yield 64, width, columns, 4, stages
            yield 128, width, columns, 4, stages
    else:
        for stages in (3, 4):
            yield 128, width, 128, 8, stages
            yield 128, 128, 128, 8, stages
            yield 128, 128, 64, 8, stages
            yield 64, 128, 128, 4, stages


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> LinearInputs:
    values = torch.randint(-128, 128, (shape["n"], shape["k"]), dtype=torch.int8, device=device)
    weight = W8A8(values, torch.rand(shape["n"], device=device) + 0.5)
    x = torch.randn(shape["m"], shape["k"], device=device).to(dtype)
    return (x, _pack(weight), (None, None), x.new_empty(shape["m"], shape["n"]))


def _cost(shape: Shape, dtype: torch.dtype) -> Cost:
    m, n, k = shape["m"], shape["n"], shape["k"]
    return Cost(n * k + 4 * n + dtype.itemsize * m * (n + k), 2 * m * n * k)


W8A8_LINEAR = Operator(
    "linear_w8a8",
    _inputs,
    plan,
    candidates,
    _cost,
    (
        {"m": 1, "n": 4096, "k": 1024},
        {"m": 1, "n": 64, "k": 72},
        {"m": 64, "n": 4096, "k": 1024},
        {"m": 256, "n": 4096, "k": 1024},
    ),
)
OPERATORS = (W8A8_LINEAR,)
