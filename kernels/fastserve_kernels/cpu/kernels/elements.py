"""Elements as they lie in memory, and how vectors of them become float32 and back.

They are float32, float16, bfloat16, int8 or float8 (e4m3fn). numba has no arithmetic for the short floats:
here they are named after integers of their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

float32 = types.float32
float16 = types.int16
bfloat16 = types.uint16
int8 = types.int8
float8 = types.uint8

FLOAT = ir.FloatType()
I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)


def bytes_of(element: Any) -> int:
    """Its bytes."""
    return element.bitwidth // 8


def vector_of(element: ir.Type, like: ir.Value) -> ir.VectorType:
    """The type of as many elements as another vector has."""
    return ir.VectorType(element, like.type.count)


def same(kind: ir.VectorType, number: float) -> ir.Constant:
    """A vector of one number."""
    return ir.Constant(kind, [number] * kind.count)


def call(builder: ir.IRBuilder, name: str, *args: ir.Value) -> ir.Value:
    """An intrinsic of LLVM's on vectors of one type."""
    kind = args[0].type
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(kind, [kind] * len(args)), f"llvm.{name}.v{kind.count}f32"
    )
    return builder.call(function, args)


def choose_lanes(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, lanes: Sequence[int]) -> ir.Value:
    """A vector of lanes of a, or of b from a's number of lanes on."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))


def repeated(builder: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    """A vector of one value."""
    nothing = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    return choose_lanes(builder, builder.insert_element(nothing, value, I32(0)), nothing, [0] * lanes)


def invoke(builder: ir.IRBuilder, name: str, kind: ir.Type, *args: ir.Value) -> ir.Value:
    """An intrinsic of LLVM's on values of any types, which gives one of this type."""
    signature = ir.FunctionType(kind, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, f"llvm.{name}"), args)


def widen(builder: ir.IRBuilder, element: types.Type, raw: ir.Value) -> ir.Value:
    """Elements as they lie in memory, as float32."""
    if element == float32:
        return raw
    if element == float16:
        return builder.fpext(builder.bitcast(raw, vector_of(ir.HalfType(), raw)), vector_of(FLOAT, raw))
    if element == float8:
        return _widen_float8(builder, raw)
    words = vector_of(I32, raw)
    if element == int8:
        return builder.sitofp(builder.sext(raw, words), vector_of(FLOAT, raw))
    return builder.bitcast(builder.shl(builder.zext(raw, words), same(words, 16)), vector_of(FLOAT, raw))


def _widen_float8(builder: ir.IRBuilder, raw: ir.Value) -> ir.Value:
    """By way of float16, which has one more bit of exponent, and 8 more of its bias. Exact; but what is not a
    number becomes 480."""
    shorts = vector_of(I16, raw)
    placed = builder.shl(builder.sext(raw, shorts), same(shorts, 7))
    halves = builder.bitcast(builder.and_(placed, same(shorts, 0xBFFF)), vector_of(ir.HalfType(), raw))
    wide = builder.fpext(halves, vector_of(FLOAT, raw))
    return builder.fmul(wide, same(wide.type, 256.0))


def narrow(builder: ir.IRBuilder, element: types.Type, value: ir.Value) -> ir.Value:
    """float32 as elements in memory, rounded to nearest, ties to even. The bytes have no infinity: what lies
    beyond their largest becomes that, and what is not a number may become anything."""
    if element == float32:
        return value
    shorts, words = vector_of(I16, value), vector_of(I32, value)
    if element == int8:
        whole = call(builder, "rint", _clamp(builder, value, 127.0))
        return builder.trunc(builder.fptosi(whole, words), vector_of(I8, value))
    if element == float8:
        return _narrow_float8(builder, _clamp(builder, value, 448.0))
    if element == float16:
        return builder.bitcast(builder.fptrunc(value, vector_of(ir.HalfType(), value)), shorts)
    bits = builder.bitcast(value, words)
    odd = builder.and_(builder.lshr(bits, same(words, 16)), same(words, 1))
    rounded = builder.add(bits, builder.add(odd, same(words, 0x7FFF)))
    # Rounding would turn some NaNs into infinity.
    nan = builder.fcmp_unordered("uno", value, value)
    bits = builder.select(nan, same(words, 0x7FC00000), rounded)
    return builder.trunc(builder.lshr(bits, same(words, 16)), shorts)


def _clamp(builder: ir.IRBuilder, value: ir.Value, most: float) -> ir.Value:
    for sign, limit in (("<", most), (">", -most)):
        bound = same(value.type, limit)
        value = builder.select(builder.fcmp_ordered(sign, value, bound), value, bound)
    return value


def _narrow_float8(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Numbers of at most 448: the exponent's bias falls from 127 to 7, the mantissa from 23 bits to 3. Those
    below 2^-6 are multiples of 2^-9, which is the last place of a float32 of 2^14."""
    words = vector_of(I32, value)
    size = call(builder, "fabs", value)
    bits = builder.bitcast(size, words)
    odd = builder.and_(builder.lshr(bits, same(words, 20)), same(words, 1))
    half_less_one = same(words, (1 << 19) - 1 - (120 << 23))
    normal = builder.lshr(builder.add(bits, builder.add(odd, half_less_one)), same(words, 20))
    tiny = builder.bitcast(builder.fadd(size, same(value.type, 2.0**14)), words)
    is_normal = builder.fcmp_ordered(">=", size, same(value.type, 2.0**-6))
    magnitude = builder.select(is_normal, normal, builder.and_(tiny, same(words, 0xF)))
    sign = builder.lshr(builder.bitcast(value, words), same(words, 31))
    signed = builder.or_(magnitude, builder.shl(sign, same(words, 7)))
    return builder.trunc(signed, vector_of(I8, value))
