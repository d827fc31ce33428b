"""PTX for registers of two 16-bit words or numbers, which `unpack` needs: the compiler would take them apart.

Each function returns the text for `tl.inline_asm_elementwise(..., pack=2)`: $0 is the result, then come the
arguments. dtype is bfloat16 or float16. Everything here is PTX that sm_80 has.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def power_of_mantissa(dtype: tl.dtype) -> float:
    """2^m, whose sums with smaller whole numbers are exact; 0 for float32, which needs no such trick."""
    return {tl.bfloat16: 128.0, tl.float16: 1024.0}.get(dtype, 0.0)


@triton.constexpr_function
def _pair(dtype: tl.dtype, exponent: int, negative: bool = False) -> str:
    """A register of twice 2^exponent."""
    bias, mantissa = (127, 7) if dtype == tl.bfloat16 else (15, 10)
    half = negative << 15 | exponent + bias << mantissa
    return f"0x{half << 16 | half:08x}"


@triton.constexpr_function
def _fma(dtype: tl.dtype) -> str:
    return "fma.rn.bf16x2" if dtype == tl.bfloat16 else "fma.rn.f16x2"


@triton.constexpr_function
def digits(dtype: tl.dtype, shift: int, mask: int) -> str:
    """The numbers 2^m + ($1 >> shift & mask)."""
    base = _pair(dtype, 7 if dtype == tl.bfloat16 else 10)
    move = f"shr.b32 t, $1, {shift};" if shift else "mov.b32 t, $1;"
    return f"{{ .reg .b32 t; {move} lop3.b32 $0, t, 0x{mask << 16 | mask:08x}, {base}, 0xea; }}"


@triton.constexpr_function
def difference(dtype: tl.dtype) -> str:
    """$1 - $2."""
    return f"{{ .reg .b32 m; mov.b32 m, {_pair(dtype, 0, True)}; {_fma(dtype)} $0, $2, m, $1; }}"


@triton.constexpr_function
def product(dtype: tl.dtype) -> str:
    """$1 * $2."""
    return f"{{ .reg .b32 z; mov.b32 z, 0x80008000; {_fma(dtype)} $0, $1, $2, z; }}"


@triton.constexpr_function
def float8(dtype: tl.dtype, index: int) -> str:
    """The numbers whose float8_e4m3fn is byte `index` of the words $1.

    Its exponent and mantissa, at the place of the wider float's, are the number over 2^(bias - 7), also where
    they are subnormal there.
    """
    shift, factor = (4, 120) if dtype == tl.bfloat16 else (1, 8)
    lines = (
        ".reg .b32 u, t, f, z;",
        "mov.b32 u, $1;" if index else "shl.b32 u, $1, 8;",
        f"and.b32 t, u, 0x7f007f00; shr.b32 t, t, {shift}; lop3.b32 t, u, 0x80008000, t, 0xea;",
        f"mov.b32 f, {_pair(dtype, factor)}; mov.b32 z, 0x80008000; {_fma(dtype)} $0, t, f, z;",
    )
    return f"{{ {' '.join(lines)} }}"


@triton.constexpr_function
def codebook() -> str:
    """$0 to $3: the entries for the codes in nibbles 0 to 3 of the words $4.

    $5, $7, $9, $11 are the low bytes of the 16 entries, $13, $15, $17, $19 the high ones; the numbers between
    are the same again, as an argument of 32 bits is there for each of the pair. A permutation takes four
    bytes out of eight by the low three bits of four codes, once for each half of the entries; another chooses
    between the halves by the top bits.
    """
    lines = [
        ".reg .b32 a, b, codes0, codes1, tops0, tops1, low0, low1, high0, high1;",
        "and.b32 codes0, $4, 0x77777777; shr.b32 codes1, codes0, 16;",
        "shr.b32 tops0, $4, 1; lop3.b32 tops0, tops0, 0x44444444, 0x32103210, 0xea;",
        "shr.b32 tops1, tops0, 16;",
    ]
    for name, first in (("low", 5), ("high", 13)):
        for word in (0, 1):
            lines += [
                f"prmt.b32 a, ${first}, ${first + 2}, codes{word};",
                f"prmt.b32 b, ${first + 4}, ${first + 6}, codes{word};",
                f"prmt.b32 {name}{word}, a, b, tops{word};",
            ]
    for result, bytes_of_two in ((0, "0x5140"), (2, "0x7362")):
        lines += [
            f"prmt.b32 a, low0, high0, {bytes_of_two}; prmt.b32 b, low1, high1, {bytes_of_two};",
            f"prmt.b32 ${result}, a, b, 0x5410; prmt.b32 ${result + 1}, a, b, 0x7632;",
        ]
    return f"{{ {' '.join(lines)} }}"
