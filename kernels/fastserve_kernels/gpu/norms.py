"""RMS norm, alone and after the addition of a residual: each row is read once, stays in registers between its
sum of squares and its scaling, and is written once.

Bound: the bytes. A program takes ROWS rows of BLOCK_D = D rounded up to a power of two, 16 bytes a thread;
one row where that fills a few warps, several where rows are the heads of a model that norms each head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastserve_kernels import reference
from fastserve_kernels.gpu.arithmetic import rounded
from fastserve_kernels.gpu.launch import Argument, Config, Launch, launch_all
from fastserve_kernels.gpu.operator import Cost, Operator, Shape
from fastserve_kernels.gpu.tuning import config_for


@triton.jit
def _normed(x, weight, mask, dim, eps, dtype: tl.constexpr):
    """x [ROWS, BLOCK_D] float32, zeros where not within: rounded to dtype before and after the weight."""
    scale = tl.rsqrt(tl.sum(x * x, 1) / dim + eps)
    return rounded(rounded(x * scale[:, None], dtype).to(tl.float32) * weight[None, :], dtype)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    x, weight, out, rows, x_token, x_head, eps, HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x [T, HEADS, DIM] with strides, out [T, HEADS, DIM]; row r is token r // HEADS, head r % HEADS."""
    offs_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_m < rows)[:, None] & (offs_d < DIM)[None, :]
    x_offs = offs_m // HEADS * x_token + offs_m % HEADS * x_head
    x_rows = tl.load(x + x_offs[:, None] + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + offs_d, mask=offs_d < DIM, other=0.0).to(tl.float32)
    normed = _normed(x_rows, w, mask, DIM, eps, out.dtype.element_ty)
    tl.store(out + (offs_m * DIM)[:, None] + offs_d[None, :], normed, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def add_rms_norm_kernel(
    x, residual, weight, out, total, rows, x_token, residual_token, eps, DIM: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x and residual [T, DIM] with strides, out and total [T, DIM]."""
    offs_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_m < rows)[:, None] & (offs_d < DIM)[None, :]
    x_rows = tl.load(x + (offs_m * x_token)[:, None] + offs_d[None, :], mask=mask, other=0.0)
    residual_rows = tl.load(
        residual + (offs_m * residual_token)[:, None] + offs_d[None, :], mask=mask, other=0.0
    )
    summed = rounded(x_rows.to(tl.float32) + residual_rows.to(tl.float32), total.dtype.element_ty)
    out_offs = (offs_m * DIM)[:, None] + offs_d[None, :]
    tl.store(total + out_offs, summed, mask=mask)
    w = tl.load(weight + offs_d, mask=offs_d < DIM, other=0.0).to(tl.float32)
    normed = _normed(summed.to(tl.float32), w, mask, DIM, eps, out.dtype.element_ty)
    tl.store(out + out_offs, normed, mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`ops.rms_norm`."""
    out = x.new_empty(x.shape)
    config = config_for(RMS_NORM, _shape_of(x), x.device)
    launch_all(plan_rms_norm(x, weight.contiguous(), eps, out, config=config))
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`ops.add_rms_norm`."""
    out, total = x.new_empty(x.shape), x.new_empty(x.shape)
    config = config_for(ADD_RMS_NORM, _shape_of(x), x.device)
    launch_all(plan_add_rms_norm(x, residual, weight.contiguous(), eps, total, out, config=config))
    return out, total


def _shape_of(x: Tensor) -> dict[str, int]:
    """The number of rows is rounded up to a power of two: it changes from step to step."""
    rows = x.numel() // x.shape[-1]
    return {"tokens": triton.next_power_of_2(max(rows, 1)), "dim": x.shape[-1]}


def _dense(x: Tensor) -> Tensor:
    """x, copied unless the elements of a row lie together."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows_of_program(config: Config, dim: int) -> dict[str, int]:
    block = triton.next_power_of_2(dim)
    return {"ROWS": max(config.constants["ELEMENTS"] // block, 1), "BLOCK_D": block}


def plan_rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, *, config: Config) -> list[Launch]:
    """x [T, D] or [T, H, D], out of its shape and contiguous."""
    x = _dense(x)
    heads, dim = (x.shape[1] if x.dim() == 3 else 1), x.shape[-1]
    rows = x.shape[0] * heads
    constants = {"HEADS": heads, "DIM": dim, **_rows_of_program(config, dim)}
    arguments: dict[str, Argument] = {"x": x, "weight": weight, "out": out, "rows": rows, "eps": eps}
    arguments |= {"x_token": x.stride(0), "x_head": x.stride(1) if x.dim() == 3 else 0}
    grid = (triton.cdiv(rows, constants["ROWS"]),)
    return [Launch(rms_norm_kernel, grid, arguments, constants, config.num_warps, config.num_stages)]


def plan_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, total: Tensor, out: Tensor, *, config: Config
) -> list[Launch]:
    """x and residual [T, D]; total and out [T, D] contiguous."""
    x, residual = _dense(x), _dense(residual)
    rows, dim = x.shape
    constants = {"DIM": dim, **_rows_of_program(config, dim)}
    arguments: dict[str, Argument] = {
        "x": x,
        "residual": residual,
        "weight": weight,
        "rows": rows,
        "eps": eps,
    }
    arguments |= {"x_token": x.stride(0), "residual_token": residual.stride(0), "out": out, "total": total}
    grid = (triton.cdiv(rows, constants["ROWS"]),)
    return [Launch(add_rms_norm_kernel, grid, arguments, constants, config.num_warps, config.num_stages)]


def candidates(shape: Shape) -> list[Config]:
    """ELEMENTS: what a program takes at least; a warp's threads hold 8 to 32 each."""
    block = triton.next_power_of_2(shape["dim"])
    most = max(block, 2048)
    sizes = [size for size in (1024, 2048) if size >= block] or [most]
    return [
        Config({"ELEMENTS": size}, warps, 1)
        for size in sizes
        for warps in (4, 8, 16, 32)
        if 4 * 32 * warps <= size <= 32 * 32 * warps or (size < 512 and warps == 4)
    ]


def _inputs_of(residuals: int) -> Callable[[Shape, torch.dtype, torch.device], tuple[Any, ...]]:
    def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        size = (shape["tokens"], shape["dim"])
        rows = [torch.randn(size, dtype=dtype, device=device) for _ in range(1 + residuals)]
        outputs = [torch.empty(size, dtype=dtype, device=device) for _ in range(1 + residuals)]
        return (*rows, torch.randn(shape["dim"], dtype=dtype, device=device), 1e-5, *outputs)

    return inputs


def _cost_of(passes: int) -> Callable[[Shape, torch.dtype], Cost]:
    def cost(shape: Shape, dtype: torch.dtype) -> Cost:
        elements = shape["tokens"] * shape["dim"]
        return Cost(bytes=(passes * elements + shape["dim"]) * dtype.itemsize, flops=4 * elements)

    return cost


def _reference_rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    return reference.rms_norm(x.float(), weight.float(), eps)


def _reference_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, total: Tensor, out: Tensor
) -> Tensor:
    return reference.rms_norm((x + residual).float(), weight.float(), eps)


COMPILED_SHAPES = tuple({"tokens": 4, "dim": dim} for dim in (64, 576, 4096, 8192))

RMS_NORM = Operator(
    name="rms_norm",
    inputs=_inputs_of(0),
    plan=plan_rms_norm,
    candidates=candidates,
    cost=_cost_of(2),
    compiled_shapes=COMPILED_SHAPES,
    reference=_reference_rms_norm,
)
ADD_RMS_NORM = Operator(
    name="add_rms_norm",
    inputs=_inputs_of(1),
    plan=plan_add_rms_norm,
    candidates=candidates,
    cost=_cost_of(4),
    compiled_shapes=COMPILED_SHAPES,
    reference=_reference_add_rms_norm,
)
OPERATORS = (RMS_NORM, ADD_RMS_NORM)
