"""The two kernels of 2:4 weights: floats, and integers of four bits.

Bound: with few tokens the bytes of the weight: per group of four columns 4.5 (16-bit floats), or 1.5 and the
scales (integers), of 8 that dense 16-bit weights have. An H200 has about 7 instructions per byte that it
reads: 31 per group of floats, 11 per group of integers, of which decoding, x and all else may take no more.

A tile of the weight comes compact through shared memory into registers, in the places that the tensor cores'
left operand has there, and is spread out in those registers: of a group of four columns g the kernel makes
the four numbers w0 to w3 that belong to columns 4 g to 4 g + 3, two of them 0. Sixteen groups and four
columns are four products of depth 16: the left operand of the first is w0 of the sixteen groups, its right
operand columns 0, 4, ..., 60 of x, and so on. So what is irregular stays in registers, nothing of the weight
is moved for it, and the tensor cores' time, of which decoding has plenty, pays for the zeros. The output
tile is [features, tokens]: for up to 8 tokens the tensor cores multiply 16 x 8 tiles, not padded to 16.

x is read as one 64-bit word per group of four columns (float32: number by number), so that the columns c of
sixteen groups are shifts of words that one thread has.

Patterns: bit 4 j + c of the pattern word at [t, n, i] is 1 if column c is kept of group 64 t + 16 j + i of
row n. Of a group's two kept numbers the first is called a, the second b. As the two are in order,
    w0 = p0 ? a : 0    w1 = p1 ? (p0 ? b : a) : 0    w2 = p2 ? (p3 ? a : b) : 0    w3 = p3 ? b : 0.
On a GPU 14 instructions do this for two groups of floats, and 53 (bfloat16: 61) for eight groups of
integers, their conversion to floats included, as PTX. The whole main loop (machine code for sm_90, up to 8
tokens, 32 rows per warp) has 10.3 per group of floats and 9.9 (10.9) per group of integers; all its loads
but those of scales are of 16 bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastserve_kernels.gpu.arithmetic import INTERPRETED, multiply
from fastserve_kernels.gpu.split_k import store_sums

CHUNKS = tl.constexpr(4)
GROUPS = tl.constexpr(16)
"""Groups of four columns in a chunk; CHUNKS chunks are a tile."""
TILE = tl.constexpr(256)


def _spread_floats_asm(chunk: int) -> str:
    """PTX: (w0, w1, w2, w3) of two groups from a ($4), b ($5) and pattern words ($6), 16 bits each."""
    masks = "".join(
        f"shl.b32 m{c}, $6, {15 - 4 * chunk - c}; prmt.b32 m{c}, m{c}, m{c}, 0xBB99; " for c in range(4)
    )  # the bit becomes the sign of its half, and the sign fills the half
    return (
        "{ .reg .b32 m0, m1, m2, m3, s, t; " + masks + "lop3.b32 s, $5, $4, m0, 0xE4; "  # m0 ? b : a
        "lop3.b32 t, $4, $5, m3, 0xE4; "  # m3 ? a : b
        "and.b32 $0, $4, m0; and.b32 $1, s, m1; and.b32 $2, t, m2; and.b32 $3, $5, m3; }"
    )


def _spread_integers_asm(bfloat16: bool) -> str:
    """PTX: w0 to w3 of chunk 0 ($0 to $3), then of chunks 1 to 3, two groups each, as floats from -8 to 7.

    From words of four codes, exclusive or 8, a ($16) and b ($17), and pattern words ($18). What is left out
    has code 0, exclusive or 8: 8, which is the number 0.
    """
    masks = "and.b32 m0, $18, 0x11111111; mul.lo.u32 m0, m0, 15; " + "".join(
        f"shr.u32 m{c}, $18, {c}; and.b32 m{c}, m{c}, 0x11111111; mul.lo.u32 m{c}, m{c}, 15; "
        for c in (1, 2, 3)
    )
    select = (
        "lop3.b32 v1, $17, $16, m0, 0xE4; lop3.b32 v2, $16, $17, m3, 0xE4; "
        "and.b32 v0, $16, m0; and.b32 v1, v1, m1; and.b32 v2, v2, m2; and.b32 v3, $17, m3; "
    )
    convert = "".join(_integers_to_floats_asm(chunk, c, bfloat16) for chunk in range(4) for c in range(4))
    return (
        "{ .reg .b32 m0, m1, m2, m3, v0, v1, v2, v3, t, one, sixteenth, offset, offset16; "
        + ("mov.b32 one, 0x3F803F80; mov.b32 offset, 0xC308C308; " if bfloat16 else
           "mov.b32 one, 0x3C003C00; mov.b32 sixteenth, 0x2C002C00; "
           "mov.b32 offset, 0xE408E408; mov.b32 offset16, 0xD480D480; ")
        + masks + select + convert + "}"
    )  # fmt: skip


def _integers_to_floats_asm(chunk: int, column: int, bfloat16: bool) -> str:
    """PTX: two codes of v{column} as floats: put as the lowest bits of 128 or 1024, of which 8 more is taken.

    float16 has room for two codes above each other: the higher counts sixteenfold, and is divided.
    """
    out, codes = f"${4 * chunk + column}", f"v{column}"
    if bfloat16:
        shift = f"shr.u32 t, {codes}, {4 * chunk}; "
        return shift + f"lop3.b32 t, t, 0x000F000F, 0x43084308, 0x6A; fma.rn.bf16x2 {out}, t, one, offset; "
    shift = f"shr.u32 {codes}, {codes}, 8; " if chunk == 2 else ""
    if chunk % 2:
        return (
            f"lop3.b32 t, {codes}, 0x00F000F0, 0x64806480, 0x6A; fma.rn.f16x2 {out}, t, sixteenth, offset16; "
        )
    return shift + f"lop3.b32 t, {codes}, 0x000F000F, 0x64086408, 0x6A; add.rn.f16x2 {out}, t, offset; "


_SPREAD_FLOATS = tl.constexpr(tuple(_spread_floats_asm(chunk) for chunk in range(4)))
_SPREAD_BFLOAT16 = tl.constexpr(_spread_integers_asm(True))
_SPREAD_FLOAT16 = tl.constexpr(_spread_integers_asm(False))
_SPREAD_CONSTRAINTS = tl.constexpr("=r," * 16 + "r,r,r")
_BFLOAT16S = tl.constexpr((tl.bfloat16,) * 16)
_FLOAT16S = tl.constexpr((tl.float16,) * 16)


@triton.jit
def _spread(a, b, patterns, CHUNK: tl.constexpr):
    """(w0, w1, w2, w3) of a chunk."""
    if not INTERPRETED and a.dtype.primitive_bitwidth == 16:
        return tl.inline_asm_elementwise(
            _SPREAD_FLOATS[CHUNK], "=r,=r,=r,=r,r,r,r", [a, b, patterns],
            dtype=(a.dtype, a.dtype, a.dtype, a.dtype), is_pure=True, pack=2,
        )  # fmt: skip
    bits = patterns.to(tl.int32) >> (4 * CHUNK)
    p0, p1, p2, p3 = (bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0
    zero = tl.zeros_like(a)
    return (
        tl.where(p0, a, zero),
        tl.where(p1, tl.where(p0, b, a), zero),
        tl.where(p2, tl.where(p3, a, b), zero),
        tl.where(p3, b, zero),
    )


@triton.jit
def _spread_integers(a, b, patterns, dtype: tl.constexpr):
    """(w0, w1, w2, w3) of each of the four chunks, sixteen tensors, from words of four codes."""
    if not INTERPRETED and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            _SPREAD_BFLOAT16, _SPREAD_CONSTRAINTS, [a, b, patterns], dtype=_BFLOAT16S, is_pure=True, pack=2
        )
    if not INTERPRETED and dtype == tl.float16:
        return tl.inline_asm_elementwise(
            _SPREAD_FLOAT16, _SPREAD_CONSTRAINTS, [a, b, patterns], dtype=_FLOAT16S, is_pure=True, pack=2
        )
    return (
        _spread(_number(a, 0, dtype), _number(b, 0, dtype), patterns, 0)
        + _spread(_number(a, 1, dtype), _number(b, 1, dtype), patterns, 1)
        + _spread(_number(a, 2, dtype), _number(b, 2, dtype), patterns, 2)
        + _spread(_number(a, 3, dtype), _number(b, 3, dtype), patterns, 3)
    )


@triton.jit
def _number(words, CHUNK: tl.constexpr, dtype: tl.constexpr):
    """The codes of a chunk, less 8."""
    code = (words.to(tl.int32) >> (4 * CHUNK)) & 15
    return ((code ^ 8) - 8).to(tl.float32).to(dtype)


@triton.jit
def _columns(x, offs_k4, offs_m, M, K, dtype: tl.constexpr, EVEN_K: tl.constexpr):
    """Columns 0 to 3 of groups of four columns of x, transposed: each [groups, tokens]."""
    mask = (offs_m < M)[None, :]
    if not EVEN_K:
        mask = mask & (offs_k4 < K // 4)[:, None]
    if dtype == tl.float32:
        first = x + offs_m[None, :] * K + 4 * offs_k4[:, None]
        x0 = tl.load(first, mask=mask, other=0.0)
        x1 = tl.load(first + 1, mask=mask, other=0.0)
        x2 = tl.load(first + 2, mask=mask, other=0.0)
        x3 = tl.load(first + 3, mask=mask, other=0.0)
    else:
        words = tl.load(x + offs_m[None, :] * (K // 4) + offs_k4[:, None], mask=mask, other=0)
        x0 = words.to(tl.int16).to(dtype, bitcast=True)
        x1 = (words >> 16).to(tl.int16).to(dtype, bitcast=True)
        x2 = (words >> 32).to(tl.int16).to(dtype, bitcast=True)
        x3 = (words >> 48).to(tl.int16).to(dtype, bitcast=True)
    return x0, x1, x2, x3


@triton.jit
def _multiply(acc, w0, w1, w2, w3, x0, x1, x2, x3):
    """acc [features, tokens] plus the four products of a chunk."""
    acc = multiply(w0, x0, acc)
    acc = multiply(w1, x1, acc)
    acc = multiply(w2, x2, acc)
    return multiply(w3, x3, acc)


@triton.jit
def _share(count, SPLITS: tl.constexpr):
    """The (first, end) of this program's share of `count` tiles of K."""
    split = tl.program_id(2)
    return split * count // SPLITS, (split + 1) * count // SPLITS


@triton.jit(do_not_specialize=["M"])
def sparse24(
    x, values, patterns, bias, residual, out, partial, arrivals, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """x: [M, K / 4] int64, or [M, K] float32. values: [tiles of K, 4 chunks, 2, N, 16]: a, then b.

    patterns: [tiles of K, N, 16] int16. grid: (tiles of M, tiles of N, SPLITS).
    """
    DTYPE: tl.constexpr = out.dtype.element_ty
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    groups = tl.arange(0, 16)
    mask_n = (offs_n < N)[:, None]
    offs = offs_n[:, None] * 16 + groups[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first, end = _share(tl.cdiv(K, TILE), SPLITS)
    for step in range(first, end):
        kept = tl.load(patterns + step * N * 16 + offs, mask=mask_n, other=0)
        for chunk in tl.static_range(4):
            pair = values + (step * 4 + chunk) * N * 32 + offs
            a = tl.load(pair, mask=mask_n, other=0.0)
            b = tl.load(pair + N * 16, mask=mask_n, other=0.0)
            w0, w1, w2, w3 = _spread(a, b, kept, chunk)
            x0, x1, x2, x3 = _columns(x, step * 64 + chunk * 16 + groups, offs_m, M, K, DTYPE, EVEN_K)
            acc = _multiply(acc, w0, w1, w2, w3, x0, x1, x2, x3)
    store_sums(
        acc, out, bias, residual, partial, arrivals, offs_n, offs_m, N, M, N,
        tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.program_id(2), SPLITS,
    )  # fmt: skip


@triton.jit
def _only(x, ours):
    """x where `ours`, else 0."""
    return tl.where(ours, x, tl.zeros_like(x))


@triton.jit
def _load_scales(scales, step, offs_n, N, PER_TILE: tl.constexpr):
    """The scales of a tile of K, one tensor [features] float32 for each of its scale groups."""
    found = ()
    for group in tl.static_range(PER_TILE):
        offs = (step * PER_TILE + group) * N + offs_n
        loaded = tl.load(scales + offs, mask=offs_n < N, other=0.0)
        found += (loaded.to(tl.float32),)  # type: ignore[assignment]
    return found


@triton.jit(do_not_specialize=["M"])
def sparse24_int4(
    x, codes, patterns, scales, bias, residual, out, partial, arrivals, M, N, K, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """x: [M, K / 4] int64, or [M, K] float32. codes: [tiles of K, 2, N, 16] int16: a, then b, each the codes
    of the four chunks from the low bits up, exclusive or 8. patterns: [tiles of K, N, 16] int16. scales:
    [scale groups of all tiles, N].

    The products of a scale group, of codes less 8, are added up, and the sum is scaled. A chunk is two scale
    groups of 32 columns: then x is taken half by half, the rest 0.
    grid: (tiles of M, tiles of N, SPLITS).
    """
    DTYPE: tl.constexpr = out.dtype.element_ty
    PER_TILE: tl.constexpr = TILE // GROUP
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    groups = tl.arange(0, 16)
    mask_n = (offs_n < N)[:, None]
    offs = offs_n[:, None] * 16 + groups[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first, end = _share(tl.cdiv(K, TILE), SPLITS)
    for step in range(first, end):
        kept = tl.load(patterns + step * N * 16 + offs, mask=mask_n, other=0)
        a = tl.load(codes + step * N * 32 + offs, mask=mask_n, other=0)
        b = tl.load(codes + step * N * 32 + N * 16 + offs, mask=mask_n, other=0)
        scale = _load_scales(scales, step, offs_n, N, PER_TILE)
        w = _spread_integers(a, b, kept, DTYPE)
        group_acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for chunk in tl.static_range(4):
            w0, w1, w2, w3 = w[4 * chunk], w[4 * chunk + 1], w[4 * chunk + 2], w[4 * chunk + 3]
            x0, x1, x2, x3 = _columns(x, step * 64 + chunk * 16 + groups, offs_m, M, K, DTYPE, EVEN_K)
            if GROUP == 32:
                for half in tl.static_range(2):
                    ours = (groups // 8 == half)[:, None]
                    group_acc = _multiply(
                        tl.zeros((BLOCK_N, BLOCK_M), tl.float32), w0, w1, w2, w3,
                        _only(x0, ours), _only(x1, ours), _only(x2, ours), _only(x3, ours),
                    )  # fmt: skip
                    acc += group_acc * scale[2 * chunk + half][:, None]
            else:
                group_acc = _multiply(group_acc, w0, w1, w2, w3, x0, x1, x2, x3)
                if (64 * chunk + 64) % GROUP == 0:
                    acc += group_acc * scale[64 * chunk // GROUP][:, None]
                    group_acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    store_sums(
        acc, out, bias, residual, partial, arrivals, offs_n, offs_m, N, M, N,
        tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.program_id(2), SPLITS,
    )  # fmt: skip
