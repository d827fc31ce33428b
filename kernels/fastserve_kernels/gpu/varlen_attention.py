"""`ops.varlen_attention` on a GPU: attention of each token to all of its sequence, over a ragged batch.

Bound: 2 (D + Dv) floating-point operations for each query and each key it sees, on tensor cores. A program
takes BLOCK_M queries of one head of one sequence and goes over the keys in tiles of BLOCK_N, with the softmax
kept up as they go by (arXiv 2205.14135); where there is a window, over those tiles alone that it reaches.

The grid holds T / BLOCK_M + B tiles for each head, as that of `prefill_attention` does and for the same
reason: how many programs run follows from shapes, and nothing waits for the lengths.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastserve_kernels import reference
from fastserve_kernels.gpu.arithmetic import multiply, rounded
from fastserve_kernels.gpu.attention_tiles import LOG2_E, softmax_step
from fastserve_kernels.gpu.launch import Argument, Config, Launch, launch_all
from fastserve_kernels.gpu.operator import Cost, Operator, Shape
from fastserve_kernels.gpu.prefill_attention import sequence_of
from fastserve_kernels.gpu.tuning import config_for

SCAN = 256
"""Sequences whose lengths a program looks at together to find its own."""
FLOAT32 = Config({"BLOCK_M": 16, "BLOCK_N": 32}, num_stages=2)
"""Tensor cores do not multiply float32 as it is: it has small tiles, whatever was tuned for others."""


@triton.jit(do_not_specialize=["sequences", "window", "farthest"])
def varlen(
    q, k, v, cu_seqlens, bias, out, sequences, scale, window, farthest,
    q_token, q_head, k_token, k_head, v_token, v_head,
    HEADS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, WINDOWED: tl.constexpr, SCAN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """out [T, HEADS, DIM_V] contiguous; bias [HEADS, 2 farthest + 1] or None."""
    head = tl.program_id(0) % HEADS
    number = tl.program_id(0) // HEADS
    sequence = sequence_of(number, cu_seqlens, sequences, BLOCK_M, SCAN)
    begin = tl.load(cu_seqlens + sequence)
    length = (tl.load(cu_seqlens + sequence + 1) - begin).to(tl.int32)
    before = (number - (begin // BLOCK_M).to(tl.int32) - sequence) * BLOCK_M
    if before >= length:
        return
    offs_m = before + tl.arange(0, BLOCK_M)
    offs_d, offs_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    is_query = offs_m < length
    q_offs = (begin + offs_m) * q_token + head * q_head
    q_mask = is_query[:, None] & (offs_d < DIM)[None, :]
    queries = tl.load(q + q_offs[:, None] + offs_d[None, :], mask=q_mask, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    first, end = 0, length
    if WINDOWED:
        first = tl.maximum(before - window, 0) // BLOCK_N * BLOCK_N
        end = tl.minimum(length, before + BLOCK_M + window)
    for base in range(first, end, BLOCK_N):
        offs_n = base + tl.arange(0, BLOCK_N)
        is_key = offs_n < length
        k_offs = (begin + offs_n) * k_token + head * k_head
        v_offs = (begin + offs_n) * v_token + head * v_head
        keys = tl.load(
            k + k_offs[:, None] + offs_d[None, :], mask=is_key[:, None] & (offs_d < DIM)[None, :], other=0.0
        )
        values = tl.load(
            v + v_offs[:, None] + offs_dv[None, :],
            mask=is_key[:, None] & (offs_dv < DIM_V)[None, :],
            other=0.0,
        )
        qk = multiply(queries, tl.trans(keys), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)) * (scale * LOG2_E)
        distance = offs_n[None, :] - offs_m[:, None]
        mask = is_key[None, :] & is_query[:, None]
        if bias is not None:
            column = tl.minimum(tl.maximum(distance, -farthest), farthest) + farthest
            added = tl.load(bias + head * (2 * farthest + 1) + column, mask=mask, other=0.0)
            qk += added.to(tl.float32) * LOG2_E
        if WINDOWED:
            mask = mask & (distance <= window) & (distance >= -window)
        qk = tl.where(mask, qk, float("-inf"))
        p, alpha, m_i, l_i = softmax_step(qk, m_i, l_i)
        acc = multiply(rounded(p, queries.dtype), values, acc * alpha[:, None])
    share = 1.0 / tl.where(is_query, l_i, 1.0)
    rows = (begin + offs_m) * HEADS + head
    tl.store(
        out + rows[:, None] * DIM_V + offs_dv[None, :],
        rounded(acc * share[:, None], out.dtype.element_ty),
        mask=is_query[:, None] & (offs_dv < DIM_V)[None, :],
    )


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
    bias: Tensor | None,
) -> Tensor:
    """`ops.varlen_attention`."""
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    if out.numel() == 0:
        return out
    shape = {
        "batch": triton.next_power_of_2(len(cu_seqlens) - 1),
        "tokens": triton.next_power_of_2(q.shape[0]),
        "heads": q.shape[1],
        "dim": q.shape[2],
    }
    config = config_for(VARLEN_ATTENTION, shape, q.device)
    launch_all(plan(q, k, v, cu_seqlens, scale, window, bias, out, config=config))
    return out


def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
    bias: Tensor | None,
    out: Tensor,
    *,
    config: Config,
) -> list[Launch]:
    """The elements of a head lie together in q, k and v; out [T, H, Dv] is contiguous."""
    if q.dtype == torch.float32:
        config = FLOAT32
    tokens, heads, dim = q.shape
    sequences, dim_v = len(cu_seqlens) - 1, v.shape[2]
    arguments: dict[str, Argument] = {
        "q": q,
        "k": k,
        "v": v,
        "cu_seqlens": cu_seqlens,
        "bias": None if bias is None else bias.contiguous(),
        "out": out,
        "sequences": sequences,
        "scale": scale,
        "window": window or 0,
        "farthest": 0 if bias is None else bias.shape[1] // 2,
        "q_token": q.stride(0),
        "q_head": q.stride(1),
        "k_token": k.stride(0),
        "k_head": k.stride(1),
        "v_token": v.stride(0),
        "v_head": v.stride(1),
    }
    constants = {
        "HEADS": heads,
        "DIM": dim,
        "DIM_V": dim_v,
        "WINDOWED": window is not None,
        "SCAN": SCAN,
        "BLOCK_M": config.constants["BLOCK_M"],
        "BLOCK_N": config.constants["BLOCK_N"],
        "BLOCK_D": max(triton.next_power_of_2(dim), 16),
        "BLOCK_DV": max(triton.next_power_of_2(dim_v), 16),
    }
    grid = ((tokens // config.constants["BLOCK_M"] + sequences) * heads,)
    return [Launch(varlen, grid, arguments, constants, config.num_warps, config.num_stages)]


def candidates(shape: Shape) -> list[Config]:
    """(queries of a tile, keys of a tile, stages, warps)."""
    tried = [(64, 64, 3, 4), (128, 64, 3, 8), (64, 32, 3, 4), (32, 64, 3, 4), (128, 32, 3, 8), (16, 64, 3, 4)]
    if shape["dim"] > 64:
        tried[:2] = [(64, 32, 2, 4), (128, 64, 2, 8)]
    return [
        Config({"BLOCK_M": block_m, "BLOCK_N": block_n}, warps, stages)
        for block_m, block_n, stages, warps in tried
    ]


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """Sequences of one length, and what a fused product leaves of queries, keys and values."""
    batch, tokens, heads, dim = (shape[name] for name in ("batch", "tokens", "heads", "dim"))
    q, k, v = torch.randn(tokens, 3, heads, dim, dtype=dtype, device=device).unbind(1)
    cu_seqlens = torch.arange(batch + 1, device=device) * tokens // batch
    return q, k, v, cu_seqlens, dim**-0.5, None, None, q.new_empty(tokens, heads, dim)


def _cost(shape: Shape, dtype: torch.dtype) -> Cost:
    starts = [number * shape["tokens"] // shape["batch"] for number in range(shape["batch"] + 1)]
    pairs = sum((end - start) ** 2 for start, end in pairwise(starts))
    width = shape["heads"] * shape["dim"]
    return Cost(bytes=4 * shape["tokens"] * width * dtype.itemsize, flops=4 * pairs * width)


def _reference(*inputs: Any) -> Tensor:
    q, k, v, *others, _ = inputs
    return reference.varlen_attention(q.float(), k.float(), v.float(), *others)


VARLEN_ATTENTION = Operator(
    name="varlen_attention",
    inputs=_inputs,
    plan=plan,
    candidates=candidates,
    cost=_cost,
    compiled_shapes=(
        {"batch": 4, "tokens": 256, "heads": 12, "dim": 32},
        {"batch": 4, "tokens": 256, "heads": 12, "dim": 64},
        {"batch": 4, "tokens": 256, "heads": 8, "dim": 128},
    ),
    reference=_reference,
)
OPERATORS = (VARLEN_ATTENTION,)
