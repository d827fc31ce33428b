"""Codes in the blocks of `fragments` as numbers of the activations' dtype, slice by slice.

For bfloat16 and float16 on a GPU two codes at a time, in a register of two 16-bit words:

int4    (word >> 4 i & 0x000f) | 2^m is the float 2^m + code, where m is the width of the mantissa: 128 of
        bfloat16, 1024 of float16. Less 2^m + zero it is exact. 1.4 instructions per code.
int8    the low seven bits and the sign bit, each made a float in that way (bfloat16's sign bit falls on the
        exponent: 128 or 256): their difference is the value, exact. 1.9 instructions.
fp8     the bits of e4m3 at the place of the wider float's are the value times a power of two, subnormal
        numbers included; a product puts that right. 2.3 instructions, and none that only some GPUs have.
nf4     the low and the high bytes of the entries lie in four registers each. A byte permutation takes four of
        them by the low three bits of four codes, another chooses by the top bit. 3.1 instructions.

For float32, and interpreted (no inline assembly there), the same formulas in float32 arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastserve_kernels.gpu import pair_assembly
from fastserve_kernels.gpu.arithmetic import INTERPRETED, rounded
from fastserve_kernels.gpu.fragments import ROWS, SLICE, WORDS

_ROWS, _SLICE, _WORDS = tl.constexpr(ROWS), tl.constexpr(SLICE), tl.constexpr(WORDS)


def bits_of(format: str) -> int:
    """Bits of a code."""
    return {"int4": 4, "nf4": 4, "int8": 8, "fp8": 8}[format]


@triton.constexpr_function
def is_packed(dtype: tl.dtype) -> bool:
    """Whether two numbers of the dtype are made at a time."""
    return bool(not INTERPRETED.value and dtype != tl.float32)


@triton.jit
def _digits(words, SHIFT: tl.constexpr, MASK: tl.constexpr, DTYPE: tl.constexpr):
    """2^m + (words >> SHIFT & MASK)."""
    if is_packed(DTYPE):
        return tl.inline_asm_elementwise(
            pair_assembly.digits(DTYPE, SHIFT, MASK), "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2
        ).to(DTYPE, bitcast=True)
    else:
        return ((words >> SHIFT) & MASK).to(tl.float32) + pair_assembly.power_of_mantissa(DTYPE)


@triton.jit
def _difference(a, b, DTYPE: tl.constexpr):
    if is_packed(DTYPE):
        return tl.inline_asm_elementwise(
            pair_assembly.difference(DTYPE), "=r,r,r", [a, b], dtype=tl.int16, is_pure=True, pack=2
        ).to(DTYPE, bitcast=True)
    else:
        return a - b


@triton.jit
def multiplied(a, b, DTYPE: tl.constexpr):
    """The product of numbers from `unpacked` and `spread_over_words`."""
    if is_packed(DTYPE):
        return tl.inline_asm_elementwise(
            pair_assembly.product(DTYPE), "=r,r,r", [a, b], dtype=tl.int16, is_pure=True, pack=2
        ).to(DTYPE, bitcast=True)
    else:
        return a * b


@triton.jit
def _float8(words, INDEX: tl.constexpr, DTYPE: tl.constexpr):
    if is_packed(DTYPE):
        return tl.inline_asm_elementwise(
            pair_assembly.float8(DTYPE, INDEX), "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2
        ).to(DTYPE, bitcast=True)
    else:
        byte = words >> (8 * INDEX)
        half = ((byte & 0x7F) << 7) | ((byte & 0x80) << 8)
        return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def load_codebook(codebook, DTYPE: tl.constexpr):
    """What `unpacked` looks codes up in: for packed numbers the bytes of the entries, in 8 words [1, 1, 1].

    codebook: 16 float32, then 8 words of the entries' bytes in DTYPE, the low ones first.
    """
    if is_packed(DTYPE):
        words = (codebook + 16).to(tl.pointer_type(tl.int32), bitcast=True) + tl.zeros((1, 1, 1), tl.int32)
        return (tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3),
                tl.load(words + 4), tl.load(words + 5), tl.load(words + 6), tl.load(words + 7))  # fmt: skip
    else:
        return codebook


@triton.jit
def _from_codebook(words, codebook, INDEX: tl.constexpr, DTYPE: tl.constexpr):
    if is_packed(DTYPE):
        slices = tl.inline_asm_elementwise(
            pair_assembly.codebook(), "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [words, codebook[0], codebook[1], codebook[2], codebook[3],
             codebook[4], codebook[5], codebook[6], codebook[7]],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=2,
        )  # fmt: skip
        return slices[INDEX].to(DTYPE, bitcast=True)
    else:
        return tl.load(codebook + ((words >> (4 * INDEX)) & 15))


@triton.jit
def unpacked(
    words, offset, codebook, INDEX: tl.constexpr, FORMAT: tl.constexpr, ZEROS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The numbers of slice INDEX, before scales: of DTYPE where packed, else float32. Shape as the words'.

    offset: of int4, 2^m + zero; of int8, the zero, if there are ZEROS.
    """
    if FORMAT == "int4":
        return _difference(_digits(words, 4 * INDEX, 0xF, DTYPE), offset, DTYPE)
    elif FORMAT == "nf4":
        return _from_codebook(words, codebook, INDEX, DTYPE)
    elif FORMAT == "fp8":
        return _float8(words, INDEX, DTYPE)
    else:
        low = _digits(words, 8 * INDEX, 0x7F, DTYPE)
        values = _difference(low, _digits(words, 8 * INDEX, 0x80, DTYPE), DTYPE)
        return _difference(values, offset, DTYPE) if ZEROS else values


@triton.jit
def less(values, fraction, DTYPE: tl.constexpr):
    """What `unpacked` gave less the part of the zeros that is not whole."""
    return _difference(values, fraction, DTYPE)


@triton.jit
def as_tile(values, DTYPE: tl.constexpr):
    """Numbers [W, R, 512] in the order of a block as matrices [W, 16 R, 32]: names for the same registers."""
    warps: tl.constexpr = values.shape[0]
    rows: tl.constexpr = values.shape[1]
    parts = tl.reshape(rounded(values, DTYPE), (warps, rows, 2, 8, 4, 2, 2, 2))
    # half, r, c, columns 8 apart, rows 8 apart, neighbours: to rows, then columns
    return tl.reshape(tl.permute(parts, (0, 1, 6, 3, 2, 5, 4, 7)), (warps, rows * _ROWS, _SLICE))


@triton.jit
def halves(words, DTYPE: tl.constexpr):
    """The two numbers of DTYPE in each word, those of rows r and r + 8, as float32."""
    BITS: tl.constexpr = words.dtype.primitive_bitwidth // 2
    HALF: tl.constexpr = tl.int16 if BITS == 16 else tl.int32
    first = words.to(HALF).to(DTYPE, bitcast=True)
    second = (words >> BITS).to(HALF).to(DTYPE, bitcast=True)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def spread_over_rows(words, DTYPE: tl.constexpr):
    """Words [W, R, 8] of a block's rows as float32 [W, 16 R]."""
    warps: tl.constexpr = words.shape[0]
    rows: tl.constexpr = words.shape[1]
    first, second = halves(words, DTYPE)
    return tl.reshape(tl.permute(tl.join(first, second), (0, 1, 3, 2)), (warps, rows * _ROWS))


@triton.jit
def spread_over_words(words, SOURCE: tl.constexpr, DTYPE: tl.constexpr):
    """Words [W, R, 8] of a block's rows as numbers [W, R, 512], each row's in the places of its codes.

    SOURCE is the dtype of the numbers in the words; the result is of DTYPE, or float32 if that is not packed.
    """
    warps: tl.constexpr = words.shape[0]
    rows: tl.constexpr = words.shape[1]
    first, second = halves(words, SOURCE)
    if is_packed(DTYPE):
        first, second = first.to(DTYPE), second.to(DTYPE)
    both = tl.join(first, second)[:, :, None, :, None, :, None]
    return tl.reshape(tl.broadcast_to(both, (warps, rows, 2, 8, 8, 2, 2)), (warps, rows, _WORDS))
