"""Rotary position embedding of a step's queries and keys, and the way of its keys and values into the cache.

Bound: the bytes, each read and written once; with few tokens, the launch, which is why all is one. A program
takes up to HEADS heads of q, of k or of v of one token, as a tile [HEADS, D] or its two rotated halves. q, k
and v may be views of the fused output of their projection, so each has strides of its own. `rotary` and
`write_kv` are the same kernel without a cache, and without a rotation.
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
from fastserve_kernels.kv_cache import KVCache

LARGEST_INT8 = tl.constexpr(127.0)
LARGEST_FP8 = tl.constexpr(448.0)


@triton.jit
def _round_trip(x, dtype: tl.constexpr):
    return rounded(x, dtype).to(tl.float32)


@triton.jit
def _half_to_even(x):
    """To whole numbers, below 2**22 in magnitude: adding 1.5 * 2**23 leaves no bits for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _as_float8(x):
    """The bits of x in float8_e4m3fn, rounded half to even; by whole numbers, as sm_80 has no such type."""
    sign = (x.to(tl.uint32, bitcast=True) >> 24) & 0x80
    magnitude = tl.minimum(tl.abs(x), LARGEST_FP8)
    bits = magnitude.to(tl.uint32, bitcast=True)
    # Of the 23 bits of the fraction 3 stay; an exponent of 120 becomes 0.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2**-6 the codes are multiples of 2**-9.
    small = _half_to_even(magnitude * 512.0).to(tl.uint32)
    return (sign | tl.where(magnitude < 0.015625, small, normal)).to(tl.uint8)


@triton.jit
def _stored(x, scale, CACHED: tl.constexpr, dtype: tl.constexpr):
    """x [HEADS, N] float32 as elements of dtype; uint8 stands for float8_e4m3fn."""
    if CACHED:
        x = tl.where(tl.abs(x) < float("inf"), x, 0.0)
    if dtype == tl.int8:
        x = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
        return _half_to_even(tl.clamp(x, -LARGEST_INT8, LARGEST_INT8)).to(tl.int8)
    if dtype == tl.uint8:
        return _as_float8(tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape)))
    return rounded(x, dtype)


@triton.jit
def _copy(
    x,
    x_offs,
    out,
    out_offs,
    first,
    head_mask,
    scale,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    CACHED: tl.constexpr,
):
    """Stores the dimensions first to DIM of the heads at `place` at `to`."""
    offs_d = first + tl.arange(0, BLOCK)
    mask = head_mask[:, None] & (offs_d < DIM)[None, :]
    x_rows = tl.load(x + x_offs[:, None] + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(
        out + out_offs[:, None] + offs_d[None, :],
        _stored(x_rows, scale, CACHED, out.dtype.element_ty),
        mask=mask,
    )


@triton.jit
def _rotate(
    x,
    x_offs,
    cos,
    sin,
    out,
    out_offs,
    head_mask,
    scale,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    CACHED: tl.constexpr,
):
    """Stores the first 2 HALF dimensions, rotated: products and their sum are rounded, as torch does."""
    dtype: tl.constexpr = x.dtype.element_ty
    offs_d = tl.arange(0, BLOCK)
    dim_mask = offs_d < HALF
    mask = head_mask[:, None] & dim_mask[None, :]
    low = tl.load(x + x_offs[:, None] + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    high = tl.load(x + x_offs[:, None] + HALF + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    cos_low = tl.load(cos + offs_d, mask=dim_mask, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos + HALF + offs_d, mask=dim_mask, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin + offs_d, mask=dim_mask, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin + HALF + offs_d, mask=dim_mask, other=0.0).to(tl.float32)[None, :]
    new_low = _round_trip(low * cos_low, dtype) - _round_trip(high * sin_low, dtype)
    new_high = _round_trip(high * cos_high, dtype) + _round_trip(low * sin_high, dtype)
    new_low, new_high = _round_trip(new_low, dtype), _round_trip(new_high, dtype)
    stored: tl.constexpr = out.dtype.element_ty
    tl.store(out + out_offs[:, None] + offs_d[None, :], _stored(new_low, scale, CACHED, stored), mask=mask)
    tl.store(
        out + out_offs[:, None] + HALF + offs_d[None, :], _stored(new_high, scale, CACHED, stored), mask=mask
    )


@triton.jit
def _move(
    x, token, x_token, x_head, cos, sin, out, row, out_head, scales, part, COUNT: tl.constexpr,
    DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, HEADS: tl.constexpr, CACHED: tl.constexpr,
):  # fmt: skip
    """Moves the `part`-th HEADS of a token's COUNT heads to `row`; the first ROTARY_DIM dimensions turn."""
    offs_h = part * HEADS + tl.arange(0, HEADS)
    head_mask = offs_h < COUNT
    x_offs = token * x_token + offs_h * x_head
    out_offs = row + offs_h * out_head
    scale = None
    if scales is not None:
        scale = tl.load(scales + offs_h, mask=head_mask, other=1.0)
    if ROTARY_DIM > 0:
        HALF: tl.constexpr = ROTARY_DIM // 2
        HALF_BLOCK: tl.constexpr = triton.next_power_of_2(HALF)
        _rotate(x, x_offs, cos, sin, out, out_offs, head_mask, scale, HALF, HALF_BLOCK, CACHED)
    if ROTARY_DIM < DIM:
        REST_BLOCK: tl.constexpr = triton.next_power_of_2(DIM - ROTARY_DIM)
        _copy(x, x_offs, out, out_offs, ROTARY_DIM, head_mask, scale, DIM, REST_BLOCK, CACHED)


@triton.jit
def rotary_write_kv_kernel(
    q, k, v, cos, sin, q_out, k_out, v_out, slots, k_scale, v_scale, q_token, q_head, k_token, k_head,
    v_token, v_head, cos_token, sin_token, k_block, k_position, k_out_head, v_block, v_position, v_out_head,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    ROTARY_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """q may be None, or v, or with a ROTARY_DIM of 0 cos and sin. Without slots token t goes to slot t."""
    q_parts: tl.constexpr = 0 if q is None else (Q_HEADS + HEADS - 1) // HEADS
    k_parts: tl.constexpr = (KV_HEADS + HEADS - 1) // HEADS
    v_parts: tl.constexpr = 0 if v is None else (KV_HEADS + HEADS - 1) // HEADS
    parts: tl.constexpr = q_parts + k_parts + v_parts
    token = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    slot = token
    if slots is not None:
        slot = tl.load(slots + token)
    if ROTARY_DIM > 0:
        cos += token * cos_token
        sin += token * sin_token
    if q is not None:  # noqa: SIM102 - decided when compiled, and the next one when run
        if part < q_parts:
            _move(
                q, token, q_token, q_head, cos, sin, q_out, token * (Q_HEADS * DIM), DIM, None, part,
                Q_HEADS, DIM, ROTARY_DIM, HEADS, False,
            )  # fmt: skip
            return
    part -= q_parts
    if part < k_parts:
        row = slot // BLOCK_SIZE * k_block + slot % BLOCK_SIZE * k_position
        _move(
            k, token, k_token, k_head, cos, sin, k_out, row, k_out_head, k_scale, part, KV_HEADS, DIM,
            ROTARY_DIM, HEADS, slots is not None,
        )  # fmt: skip
    elif v is not None:
        row = slot // BLOCK_SIZE * v_block + slot % BLOCK_SIZE * v_position
        _move(
            v, token, v_token, v_head, cos, sin, v_out, row, v_out_head, v_scale, part - k_parts, KV_HEADS,
            DIM_V, 0, HEADS, True,
        )  # fmt: skip


Destination = tuple[Tensor, "Tensor | None", "Tensor | None", "Tensor | None"]
"""A `KVCache`; or [T, 1, Hk, D] for keys alone, which go to their own place, without slot_mapping."""


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`ops.rotary`."""
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    _run(q, k, None, cos, sin, (k_out[:, None], None, None, None), None, q_out)
    return q_out, k_out


def write_kv(k: Tensor, v: Tensor, cache: KVCache, slot_mapping: Tensor) -> None:
    """`ops.write_kv`."""
    _run(None, k, v, None, None, cache, slot_mapping, None)


def rotary_write_kv(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, cache: KVCache, slot_mapping: Tensor
) -> Tensor:
    """`ops.rotary_write_kv`."""
    q_out = q.new_empty(q.shape)
    _run(q, k, v, cos, sin, cache, slot_mapping, q_out)
    return q_out


def _run(q: Tensor | None, k: Tensor, *others: Any) -> None:
    shape = {
        "tokens": triton.next_power_of_2(max(k.shape[0], 1)),
        "heads": k.shape[1] if q is None else q.shape[1],
        "kv_heads": k.shape[1],
        "dim": k.shape[2],
    }
    launch_all(plan(q, k, *others, config=config_for(ROTARY_WRITE_KV, shape, k.device)))


def _dense(x: Tensor) -> Tensor:
    """x, copied unless its last dimension lies together."""
    return x if x.stride(-1) == 1 else x.contiguous()


def plan(
    q: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    cache: Destination,
    slot_mapping: Tensor | None,
    q_out: Tensor | None,
    *,
    config: Config,
) -> list[Launch]:
    """q_out is [T, H, D]."""
    k_out, v_out, k_scale, v_scale = cache
    arguments: dict[str, Argument] = {"q_out": q_out, "k_scale": k_scale, "v_scale": v_scale}
    arguments["slots"] = None if slot_mapping is None else slot_mapping.contiguous()
    for name, x in (("q", q), ("k", k), ("v", v)):
        dense = None if x is None else _dense(x)
        arguments |= {name: dense, f"{name}_token": 0, f"{name}_head": 0}
        if dense is not None:
            arguments |= {f"{name}_token": dense.stride(0), f"{name}_head": dense.stride(1)}
    for name, angles in (("cos", cos), ("sin", sin)):
        dense = None if angles is None else _dense(angles)
        arguments |= {name: dense, f"{name}_token": 0 if dense is None else dense.stride(0)}
    for name, out in (("k", k_out), ("v", v_out)):
        strides = (0, 0, 0) if out is None else out.stride()[:3]
        names = (f"{name}_block", f"{name}_position", f"{name}_out_head")
        arguments |= dict(zip(names, strides, strict=True))
        arguments[f"{name}_out"] = None if out is None else _codes(out)
    constants = {
        "Q_HEADS": 0 if q is None else q.shape[1],
        "KV_HEADS": k.shape[1],
        "DIM": k.shape[2],
        "DIM_V": 0 if v is None else v.shape[2],
        "ROTARY_DIM": 0 if cos is None else cos.shape[1],
        "BLOCK_SIZE": k_out.shape[1],
        "HEADS": config.constants["HEADS"],
    }
    counts = (constants["Q_HEADS"], k.shape[1], 0 if v is None else v.shape[1])
    parts = sum(triton.cdiv(count, constants["HEADS"]) for count in counts)
    grid = (k.shape[0] * parts,)
    return [Launch(rotary_write_kv_kernel, grid, arguments, constants, config.num_warps, config.num_stages)]


def _codes(cache: Tensor) -> Tensor:
    """float8 as the bytes that the kernel makes itself."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


def candidates(shape: Shape) -> list[Config]:
    """Heads of a program, and its warps."""
    return [Config({"HEADS": heads}, warps, 1) for heads, warps in ((8, 4), (4, 2), (2, 1), (4, 1), (16, 4))]


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """A step of rotary_write_kv into a cache of blocks of 16, from the fused output of the projections."""
    tokens, heads, kv_heads, dim = shape["tokens"], shape["heads"], shape["kv_heads"], shape["dim"]
    fused = torch.randn(tokens, heads + 2 * kv_heads, dim, dtype=dtype, device=device)
    q, k, v = fused.split([heads, kv_heads, kv_heads], dim=1)
    cos, sin = torch.randn(2, tokens, dim, dtype=dtype, device=device)
    blocks = triton.cdiv(tokens, 16) + 1
    caches = torch.zeros(2, blocks, 16, kv_heads, dim, dtype=dtype, device=device)
    slots = torch.randperm(blocks * 16, device=device)[:tokens]
    return q, k, v, cos, sin, KVCache(caches[0], caches[1]), slots, torch.empty_like(q).contiguous()


def _cost(shape: Shape, dtype: torch.dtype) -> Cost:
    heads = shape["heads"] + 2 * shape["kv_heads"]
    elements = shape["tokens"] * shape["dim"]
    return Cost(bytes=2 * elements * (heads + 1) * dtype.itemsize, flops=3 * elements * heads)


def _reference(*inputs: Any) -> Tensor:
    q, k, _, cos, sin, *_ = inputs
    return reference.rotary(q.float(), k.float(), cos.float(), sin.float())[0]


ROTARY_WRITE_KV = Operator(
    name="rotary_write_kv",
    inputs=_inputs,
    plan=plan,
    candidates=candidates,
    cost=_cost,
    compiled_shapes=(
        {"tokens": 4, "heads": 32, "kv_heads": 8, "dim": 128},
        {"tokens": 4, "heads": 9, "kv_heads": 3, "dim": 64},
    ),
    reference=_reference,
)
OPERATORS = (ROTARY_WRITE_KV,)
