"""SwiGLU, silu(gate) * up, of the fused output of the gate and up projections.

Bound: the bytes, each read and written once. A program takes BLOCK elements of one token, 16 bytes a thread.
"""

from __future__ import annotations

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
def swiglu_kernel(gate_up, out, token_stride, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """gate_up [T, 2 DIM] with a stride, out [T, DIM]. silu is rounded, then the product, as torch does."""
    blocks: tl.constexpr = (DIM + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // blocks).to(tl.int64)
    offs_d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = offs_d < DIM
    gate = tl.load(gate_up + token * token_stride + offs_d, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * token_stride + DIM + offs_d, mask=mask, other=0.0).to(tl.float32)
    silu = rounded(gate / (1.0 + tl.exp(-gate)), out.dtype.element_ty).to(tl.float32)
    tl.store(out + token * DIM + offs_d, rounded(silu * up, out.dtype.element_ty), mask=mask)


def swiglu(gate_up: Tensor) -> Tensor:
    """`ops.swiglu`."""
    dim = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], dim)
    rows = gate_up.reshape(-1, gate_up.shape[-1])
    shape = {"tokens": triton.next_power_of_2(max(len(rows), 1)), "dim": dim}
    launch_all(plan(rows, out, config=config_for(SWIGLU, shape, gate_up.device)))
    return out


def plan(gate_up: Tensor, out: Tensor, *, config: Config) -> list[Launch]:
    """gate_up [T, 2 I], out [T, I] contiguous."""
    if gate_up.stride(1) != 1:
        gate_up = gate_up.contiguous()
    tokens, dim = gate_up.shape[0], gate_up.shape[1] // 2
    block = min(config.constants["BLOCK"], triton.next_power_of_2(dim))
    arguments: dict[str, Argument] = {"gate_up": gate_up, "out": out, "token_stride": gate_up.stride(0)}
    grid = (tokens * triton.cdiv(dim, block),)
    constants = {"DIM": dim, "BLOCK": block}
    return [Launch(swiglu_kernel, grid, arguments, constants, config.num_warps, config.num_stages)]


def candidates(shape: Shape) -> list[Config]:
    """8 to 32 elements a thread."""
    return [
        Config({"BLOCK": block}, warps, 1)
        for block, warps in ((1024, 4), (512, 2), (2048, 8), (2048, 4), (1024, 2), (4096, 4))
    ]


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    tokens, dim = shape["tokens"], shape["dim"]
    gate_up = torch.randn(tokens, 2 * dim, dtype=dtype, device=device)
    return gate_up, gate_up.new_empty(tokens, dim)


def _cost(shape: Shape, dtype: torch.dtype) -> Cost:
    elements = shape["tokens"] * shape["dim"]
    return Cost(bytes=3 * elements * dtype.itemsize, flops=5 * elements)


def _reference(gate_up: Tensor, out: Tensor) -> Tensor:
    return reference.swiglu(gate_up.float())


SWIGLU = Operator(
    name="swiglu",
    inputs=_inputs,
    plan=plan,
    candidates=candidates,
    cost=_cost,
    compiled_shapes=({"tokens": 4, "dim": 1536}, {"tokens": 4, "dim": 14336}),
    reference=_reference,
)
OPERATORS = (SWIGLU,)
