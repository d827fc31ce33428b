"""What the attention kernels share: tiles of keys in a paged cache, and the softmax kept up as they go by.

A row is one query head of one token. Rows whose query heads share a key head lie in one tile of BLOCK_M rows,
token by token, so that a key is read once for all of them: row r is token r // GROUP, head r % GROUP.

Caches of float8_e4m3fn come as uint8: sm_80 has no such type. Their codes become float16 by moving the bits,
which makes a number 256 times too small, and that is put right in the scales. Products with such codes and
with int8 are of float16, each query scaled to a largest element of 1 so that its range suffices.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastserve_kernels.gpu.arithmetic import INTERPRETED, multiply, rounded

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def code_unit(codes: tl.constexpr):
    """What `decoded` codes of this type have to be multiplied with."""
    return 256.0 if codes == tl.uint8 else 1.0


INT8_TO_HALF = tl.constexpr("""{
    .reg .b32 shifted, low, high, bias;
    xor.b32 shifted, $2, 0x80808080;
    mov.b32 bias, 0x64806480;
    prmt.b32 low, shifted, 0x64646464, 0x4140;
    prmt.b32 high, shifted, 0x64646464, 0x4342;
    sub.f16x2 $0, low, bias;
    sub.f16x2 $1, high, bias;
}""")
"""1024 to 1279 have the bits 0x6400 to 0x64FF, from which 1152 is taken."""
FLOAT8_TO_HALF = tl.constexpr("""{
    .reg .b32 low, high, sign;
    prmt.b32 low, $2, 0, 0x1404;
    prmt.b32 high, $2, 0, 0x3424;
    and.b32 sign, low, 0x80008000;
    shr.u32 low, low, 1;
    and.b32 low, low, 0x3F803F80;
    or.b32 $0, low, sign;
    and.b32 sign, high, 0x80008000;
    shr.u32 high, high, 1;
    and.b32 high, high, 0x3F803F80;
    or.b32 $1, high, sign;
}""")
"""The bits of sign, exponent and fraction moved to their places: a 256th of the number."""


@triton.jit
def decoded(codes, dtype: tl.constexpr, PURE: tl.constexpr):
    """Elements of a cache as numbers of dtype, but for the factor `code_unit`: exact, four codes at a time.

    Not PURE says that the conversion has side effects, though it has none. Else the compiler moves it behind
    the change to the layout in which tensor cores take small tiles from registers, and for that loads
    codes from shared memory byte by byte: three times the instructions in all. Tiles of 64 rows and more go
    through shared memory as they are.
    """
    if codes.dtype == tl.int8:
        if INTERPRETED:
            half = codes.to(tl.float16)
        else:
            half = tl.inline_asm_elementwise(INT8_TO_HALF, "=r,=r,r", [codes], tl.float16, PURE, 4)
    elif codes.dtype == tl.uint8:
        if INTERPRETED:
            bits = codes.to(tl.uint16)
            half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        else:
            half = tl.inline_asm_elementwise(FLOAT8_TO_HALF, "=r,=r,r", [codes], tl.float16, PURE, 4)
    else:
        half = codes
    return half.to(dtype)


@triton.jit
def load_queries(
    q, start, query_len, head, q_token, q_head, CODES: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(queries [BLOCK_M, BLOCK_D], q_scale [BLOCK_M]) of the tokens from start that share key head `head`.

    Rows beyond query_len are zeros.
    """
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    token = (start + offs_m // GROUP).to(tl.int64)
    mask = (offs_m // GROUP < query_len)[:, None] & (offs_d < DIM)[None, :]
    offs = token * q_token + (head * GROUP + offs_m % GROUP) * q_head
    queries = tl.load(q + offs[:, None] + offs_d[None, :], mask=mask, other=0.0)
    q_scale = tl.full((BLOCK_M,), 1.0, tl.float32)
    if CODES:
        largest = tl.max(tl.abs(queries.to(tl.float32)), 1)
        q_scale = tl.where(largest > 0, largest, 1.0)
        queries = queries.to(tl.float32) / q_scale[:, None]
        if q.dtype.element_ty != tl.float32:
            queries = queries.to(tl.float16)
    return queries, q_scale


@triton.jit
def _blocks(table, tile, end, context_len, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The block of each key of a tile; 0 for tiles from `end` on, and keys beyond the context."""
    offs_n = tl.arange(0, BLOCK_N)
    mask = tile * BLOCK_N + offs_n < tl.minimum(context_len, end * BLOCK_N)
    if BLOCK_N % BLOCK_SIZE == 0:
        entry = tile * (BLOCK_N // BLOCK_SIZE) + offs_n // BLOCK_SIZE
    else:
        entry = (tile * BLOCK_N + offs_n) // BLOCK_SIZE
    return tl.load(table + entry, mask=mask, other=0)


@triton.jit
def _within_block(tile, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where each key of a tile lies in its block; where tiles are whole blocks, the same for all tiles."""
    offs_n = tl.arange(0, BLOCK_N)
    return offs_n % BLOCK_SIZE if BLOCK_N % BLOCK_SIZE == 0 else (tile * BLOCK_N + offs_n) % BLOCK_SIZE


@triton.jit
def softmax_step(qk, m_i, l_i):
    """A step of the online softmax: (exponentials, factor of what was summed so far, m_i, l_i).

    qk [BLOCK_M, BLOCK_N] are scores times 1 / ln 2; m_i and l_i [BLOCK_M] as `attend` has them.
    """
    m_new = tl.maximum(m_i, tl.max(qk, 1))
    m_safe = tl.where(m_new > float("-inf"), m_new, 0.0)
    p = tl.exp2(qk - m_safe[:, None])
    alpha = tl.exp2(m_i - m_safe)
    return p, alpha, m_new, l_i * alpha + tl.sum(p, 1)


@triton.jit
def attend(
    queries, qk_scale, acc, m_i, l_i, first, end, last_position, context_len,
    k_cache, v_cache, table, k_block, k_position, v_block, v_position, window, softcap,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One pass of the online softmax (arXiv 2205.14135) over the key tiles first to end: (acc, m_i, l_i).

    acc [BLOCK_M, BLOCK_DV] is the sum of exponentials times values, m_i the largest score, l_i the sum of
    exponentials. qk_scale [BLOCK_M] makes a score of a product of queries and keys, times 1 / ln 2 where
    scores are not capped. Without MASKED each row must see all keys of these tiles.
    """
    pure: tl.constexpr = queries.shape[0] >= 64
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    # Looked up a tile ahead: the addresses of keys and values must not wait for the table.
    block = _blocks(table, first, end, context_len, BLOCK_SIZE, BLOCK_N)
    for tile in range(first, end):
        offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        next_block = _blocks(table, tile + 1, end, context_len, BLOCK_SIZE, BLOCK_N)
        k_mask, v_mask = (offs_d < DIM)[None, :], (offs_dv < DIM_V)[None, :]
        if MASKED:
            in_context = offs_n < context_len
            k_mask, v_mask = in_context[:, None] & k_mask, in_context[:, None] & v_mask
        offs_in_block = _within_block(tile, BLOCK_SIZE, BLOCK_N)
        k_offs = (block * k_block)[:, None] + (offs_in_block * k_position)[:, None] + offs_d[None, :]
        v_offs = (block * v_block)[:, None] + (offs_in_block * v_position)[:, None] + offs_dv[None, :]
        k = tl.load(k_cache + k_offs, mask=k_mask, other=0)
        v = tl.load(v_cache + v_offs, mask=v_mask, other=0)
        qk = tl.zeros((queries.shape[0], BLOCK_N), tl.float32)
        qk = multiply(queries, tl.trans(decoded(k, queries.dtype, pure)), qk) * qk_scale[:, None]
        if CAPPED:
            qk = softcap * (1.0 - 2.0 / (tl.exp2(qk * (2.0 * LOG2_E / softcap)) + 1.0)) * LOG2_E
        if MASKED:
            mask = offs_n[None, :] <= last_position[:, None]
            if WINDOWED:
                mask = mask & (offs_n[None, :] > last_position[:, None] - window)
            qk = tl.where(mask, qk, float("-inf"))
        p, alpha, m_i, l_i = softmax_step(qk, m_i, l_i)
        acc *= alpha[:, None]
        acc = multiply(rounded(p, queries.dtype), decoded(v, queries.dtype, pure), acc)
        block = next_block
    return acc, m_i, l_i
