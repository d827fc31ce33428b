"""Vectors of float32 as a numba type: what is written here is what the processor does, in that order.

LLVM maps a vector of any number of lanes to the registers there are. Nothing is left to its auto-vectoriser,
whose loops would add up in another order than their remainders; so a kernel's result depends on its own
arithmetic alone, and never on how many rows are computed together.

Elements in memory are float32, float16 or bfloat16, told apart by the type of the pointer; numba has no
arithmetic for the latter two, so these are named after integers of that size.
"""

from __future__ import annotations

import operator
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

float32 = types.float32
float16 = types.int16
bfloat16 = types.uint16

_FLOAT = ir.FloatType()
_DOUBLE = ir.DoubleType()
_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)

LANES = 16
"""The unit that kernels over single rows work in."""
WIDE = 64 if llvmlite.binding.get_host_cpu_features().get("avx512f", False) else 16
"""The lanes of which a kernel can hold four sums, a factor and room to spare in registers."""


class Vector(types.Type):
    """`lanes` float32."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        super().__init__(f"float32x{lanes}")

    @property
    def key(self) -> int:
        return self.lanes


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, ir.VectorType(_FLOAT, vector.lanes))


def _define_arithmetic(operation: Any, instruction: str) -> None:
    """Makes a + b and the like mean vectors too."""

    @infer_global(operation)
    class _Typing(AbstractTemplate):
        def generic(self, args: tuple[types.Type, ...], kws: dict) -> Any:
            if len(args) == 2 and isinstance(args[0], Vector) and args[0] == args[1]:
                return signature(args[0], *args)
            return None

    @lower_builtin(operation, Vector, Vector)
    def _lower(context: Any, builder: ir.IRBuilder, sig: Any, args: tuple) -> ir.Value:
        return getattr(builder, instruction)(*args)


for _operation, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _define_arithmetic(_operation, _instruction)


def _constant(element: ir.Type, values: list) -> ir.Constant:
    return ir.Constant(ir.VectorType(element, len(values)), values)


def _splat(builder: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    first = builder.insert_element(
        ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined), value, _I32(0)
    )
    return builder.shuffle_vector(first, first, _constant(_I32, [0] * lanes))


def _call(builder: ir.IRBuilder, name: str, *args: ir.Value) -> ir.Value:
    """An intrinsic of LLVM on vectors of one type."""
    kind = args[0].type
    suffix = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(kind, [kind] * len(args)), f"llvm.{name}.{suffix}"
    )
    return builder.call(function, args)


def _like(builder: ir.IRBuilder, element: ir.Type, value: ir.Value) -> tuple[ir.Type, Any]:
    """The type of the same shape with another element, and how to make its constants."""
    if isinstance(value.type, ir.VectorType):
        count = value.type.count
        return ir.VectorType(element, count), lambda number: _constant(element, [number] * count)
    return element, lambda number: ir.Constant(element, number)


def _widen(builder: ir.IRBuilder, element: types.Type, raw: ir.Value) -> ir.Value:
    """Elements as they lie in memory, as float32."""
    floats, _ = _like(builder, _FLOAT, raw)
    if element == float32:
        return raw
    if element == float16:
        return builder.fpext(builder.bitcast(raw, _like(builder, ir.HalfType(), raw)[0]), floats)
    words, word = _like(builder, _I32, raw)
    return builder.bitcast(builder.shl(builder.zext(raw, words), word(16)), floats)


def _narrow(builder: ir.IRBuilder, element: types.Type, value: ir.Value) -> ir.Value:
    """float32 rounded to the nearest element, ties to even."""
    if element == float32:
        return value
    shorts, _ = _like(builder, _I16, value)
    if element == float16:
        return builder.bitcast(builder.fptrunc(value, _like(builder, ir.HalfType(), value)[0]), shorts)
    words, word = _like(builder, _I32, value)
    bits = builder.bitcast(value, words)
    odd = builder.and_(builder.lshr(bits, word(16)), word(1))
    rounded = builder.add(bits, builder.add(odd, word(0x7FFF)))
    # Rounding could carry a NaN over into infinity.
    bits = builder.select(builder.fcmp_unordered("uno", value, value), word(0x7FC00000), rounded)
    return builder.trunc(builder.lshr(bits, word(16)), shorts)


def _memory_type(element: types.Type) -> ir.Type:
    return _FLOAT if element == float32 else _I16


def _place(builder: ir.IRBuilder, pointer: ir.Value, index: ir.Value, element: types.Type, to: ir.Type) -> Any:
    size = _memory_type(element).get_abi_size(llvmlite.binding.create_target_data("e"))
    address = builder.add(builder.ptrtoint(pointer, _I64), builder.mul(index, _I64(size)))
    return builder.inttoptr(address, to.as_pointer())


@intrinsic(prefer_literal=True)
def load(typing: Any, pointer: Any, index: Any, lanes: Any) -> Any:
    """pointer[index : index + lanes] as float32."""
    element, count = pointer.dtype, lanes.literal_value

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: tuple) -> ir.Value:
        kind = ir.VectorType(_memory_type(element), count)
        place = _place(builder, args[0], args[1], element, kind)
        return _widen(builder, element, builder.load(place, align=kind.element.get_abi_alignment(_DATA)))

    return Vector(count)(pointer, types.int64, lanes), lower


_DATA = llvmlite.binding.create_target_data("e")


@intrinsic
def load_one(typing: Any, pointer: Any, index: Any) -> Any:
    """pointer[index] as float32."""
    element = pointer.dtype

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: tuple) -> ir.Value:
        place = _place(builder, args[0], args[1], element, _memory_type(element))
        return _widen(builder, element, builder.load(place))

    return float32(pointer, types.int64), lower


@intrinsic
def store(typing: Any, pointer: Any, index: Any, value: Any) -> Any:
    """pointer[index : ...] = a vector, or one float32, rounded to the pointer's elements."""
    element = pointer.dtype
    value = value if isinstance(value, Vector) else float32

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: tuple) -> ir.Value:
        narrow = _narrow(builder, element, args[2])
        place = _place(builder, args[0], args[1], element, narrow.type)
        builder.store(narrow, place, align=_memory_type(element).get_abi_alignment(_DATA))
        return context.get_dummy_value()

    return types.void(pointer, types.int64, value), lower
