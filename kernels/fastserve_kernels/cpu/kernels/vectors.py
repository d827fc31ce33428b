"""Vectors of float32 as a numba type: what is written here is what the processor does, in that order.

LLVM maps a vector of any number of lanes to the registers there are. Nothing is left to its auto-vectoriser,
whose loops add up in another order than their remainders; so a result depends on a kernel's own arithmetic
alone, and never on how many rows are computed together.

What a pointer points to are the elements of `elements.py`; the type of the pointer says which.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic as _intrinsic
from numba.extending import lower_builtin, models, register_model

from fastserve_kernels.cpu.kernels.elements import (
    FLOAT,
    I32,
    I64,
    bfloat16,
    bytes_of,
    call,
    choose_lanes,
    float8,
    float16,
    float32,
    int8,
    narrow,
    repeated,
    same,
    widen,
)
from fastserve_kernels.cpu.kernels.masks import HAS_AVX512, masked_load, masked_store

intrinsic: Any = _intrinsic
"""Not of the declared type, which knows nothing of the first parameter that callers do not pass."""

LANES = 16
"""The lanes that most kernels work in: a register of AVX-512, two of AVX2, four of NEON."""
WIDE = 64 if HAS_AVX512 else 16
"""The lanes of which the registers hold four sums, a factor and a scalar."""


class Vector(types.Type):
    """`lanes` float32."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        super().__init__(f"float32x{lanes}")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, ir.VectorType(FLOAT, vector.lanes))


def _define_arithmetic(operation: Any, instruction: str) -> None:
    @infer_global(operation)
    class _Typing(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) == 2 and isinstance(args[0], Vector) and args[0] == args[1]:
                return signature(args[0], *args)
            return None

    @lower_builtin(operation, Vector, Vector)
    def _lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return getattr(builder, instruction)(*args)


_define_arithmetic(operator.add, "fadd")
_define_arithmetic(operator.sub, "fsub")
_define_arithmetic(operator.mul, "fmul")
_define_arithmetic(operator.truediv, "fdiv")


def _address(builder: ir.IRBuilder, pointer: ir.Value, index: ir.Value, kind: ir.VectorType) -> ir.Value:
    return builder.bitcast(builder.gep(pointer, [index]), kind.as_pointer())


@intrinsic
def size_of(typing: Any, pointer: Any) -> Any:
    """The bytes of an element, a constant."""

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return I64(bytes_of(pointer.dtype))

    return types.int64(pointer), lower


@intrinsic
def is_quantized(typing: Any, pointer: Any) -> Any:
    """Whether the elements stand for multiples of a scale, a constant: the branch not taken costs nothing."""

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return ir.IntType(1)(pointer.dtype in (int8, float8))

    return types.boolean(pointer), lower


@intrinsic
def at(typing: Any, pointer: Any, index: Any) -> Any:
    """The pointer to pointer[index]."""

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.int64), lower


def pointer_cast(element: types.Type) -> Any:
    """What makes any pointer one to elements of this type."""
    target = types.CPointer(element)

    @intrinsic
    def cast(typing: Any, pointer: Any) -> Any:
        def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            return builder.bitcast(args[0], context.get_value_type(target))

        return target(pointer), lower

    return cast


as_int64 = pointer_cast(types.int64)
as_float32 = pointer_cast(types.float32)
as_bytes = pointer_cast(types.uint8)


@intrinsic
def prefetch(typing: Any, pointer: Any) -> Any:
    """Has the memory there brought into the cache while other things go on."""

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        kind = ir.FunctionType(ir.VoidType(), [args[0].type, I32, I32, I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        reading, keep_close, data = I32(0), I32(3), I32(1)
        builder.call(function, [args[0], reading, keep_close, data])
        return context.get_dummy_value()

    return types.void(pointer), lower


@intrinsic(prefer_literal=True)
def load(typing: Any, pointer: Any, index: Any, lanes: Any) -> Any:
    """pointer[index : index + lanes] as float32."""
    element, count = pointer.dtype, lanes.literal_value

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        memory = ir.VectorType(context.get_value_type(element), count)
        raw = builder.load(_address(builder, args[0], args[1], memory), align=bytes_of(element))
        return widen(builder, element, raw)

    return Vector(count)(pointer, types.int64, lanes), lower


@intrinsic
def load_masked(typing: Any, pointer: Any, index: Any, count: Any) -> Any:
    """pointer[index : index + LANES] as float32; if there are but `count`, 0 follows these."""
    element = pointer.dtype

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        memory = ir.VectorType(context.get_value_type(element), LANES)
        place = _address(builder, args[0], args[1], memory)
        with builder.if_else(builder.icmp_signed(">=", args[2], I64(LANES))) as (whole, part):
            with whole:
                all_lanes, whole_block = builder.load(place, align=bytes_of(element)), builder.block
            with part:
                some_lanes, part_block = masked_load(builder, place, memory, args[2]), builder.block
        raw = builder.phi(memory)
        raw.add_incoming(all_lanes, whole_block)
        raw.add_incoming(some_lanes, part_block)
        return widen(builder, element, raw)

    return Vector(LANES)(pointer, types.int64, types.int64), lower


@intrinsic
def store(typing: Any, pointer: Any, index: Any, vector: Any) -> Any:
    """pointer[index : index + lanes] = vector, rounded."""
    element = pointer.dtype

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        raw = narrow(builder, element, args[2])
        builder.store(raw, _address(builder, args[0], args[1], raw.type), align=bytes_of(element))
        return context.get_dummy_value()

    return types.void(pointer, types.int64, vector), lower


@intrinsic
def store_masked(typing: Any, pointer: Any, index: Any, vector: Any, count: Any) -> Any:
    """pointer[index : index + LANES] = vector, rounded; no more than `count` of it."""
    element = pointer.dtype

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        raw = narrow(builder, element, args[2])
        place = _address(builder, args[0], args[1], raw.type)
        with builder.if_else(builder.icmp_signed(">=", args[3], I64(LANES))) as (whole, part):
            with whole:
                builder.store(raw, place, align=bytes_of(element))
            with part:
                masked_store(builder, raw, place, args[3])
        return context.get_dummy_value()

    return types.void(pointer, types.int64, vector, types.int64), lower


@intrinsic
def round_to(typing: Any, pointer: Any, vector: Any) -> Any:
    """The vector as it comes back from pointer's memory."""
    element = pointer.dtype

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return widen(builder, element, narrow(builder, element, args[1]))

    return vector(pointer, vector), lower


@intrinsic(prefer_literal=True)
def splat(typing: Any, number: Any, lanes: Any) -> Any:
    """A vector of one number."""
    count = lanes.literal_value

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return repeated(builder, args[0], count)

    return Vector(count)(types.float32, lanes), lower


@intrinsic
def multiply_add(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once where the processor can."""

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return call(builder, "fmuladd", *args)

    return a(a, b, c), lower


@intrinsic
def select_range(typing: Any, x: Any, first: Any, end: Any, other: Any) -> Any:
    """Lanes first to end of x, and `other` in those outside."""

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        x, first, end, other = args
        count = x.type.count
        lane = ir.Constant(ir.VectorType(I32, count), list(range(count)))
        bounds = [repeated(builder, builder.trunc(bound, I32), count) for bound in (first, end)]
        inside = builder.and_(
            builder.icmp_signed(">=", lane, bounds[0]), builder.icmp_signed("<", lane, bounds[1])
        )
        return builder.select(inside, x, repeated(builder, other, count))

    return x(x, types.int64, types.int64, types.float32), lower


@intrinsic
def zero_nonfinite(typing: Any, pointer: Any, x: Any) -> Any:
    """x with 0 in place of what would not be finite in pointer's memory."""
    too_large = {float32: float("inf"), float16: 65520.0, bfloat16: 2.0**128 - 2.0**119}[pointer.dtype]

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        kind = args[1].type
        known = builder.fcmp_ordered("<", call(builder, "fabs", args[1]), same(kind, too_large))
        return builder.select(known, args[1], same(kind, 0.0))

    return x(pointer, x), lower


def _fold(builder: ir.IRBuilder, vector: ir.Value, join: Any) -> ir.Value:
    """Joins the two halves, the quarters, and so on down to one lane."""
    while (half := vector.type.count // 2) > 0:
        low = choose_lanes(builder, vector, vector, list(range(half)))
        high = choose_lanes(builder, vector, vector, list(range(half, 2 * half)))
        vector = join(low, high)
    return builder.extract_element(vector, I32(0))


@intrinsic
def reduce_add(typing: Any, x: Any) -> Any:
    """The sum of all lanes."""

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return _fold(builder, args[0], builder.fadd)

    return types.float32(x), lower


@intrinsic
def reduce_max(typing: Any, x: Any) -> Any:
    """The largest lane."""

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        def larger(a: ir.Value, b: ir.Value) -> ir.Value:
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        return _fold(builder, args[0], larger)

    return types.float32(x), lower


def interleaved(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """Lane j of row i at place j * len(rows) + i: of as many rows as lanes, the matrix transposed.

    Their number is a power of two. Each round takes the highest bit of a row's number and puts it below the
    lane's, which leaves them in order.
    """
    lanes = rows[0].type.count
    low = [lane for i in range(lanes // 2) for lane in (i, lanes + i)]
    halves = low, [lane + lanes // 2 for lane in low]
    half = len(rows) // 2
    for _ in range(half.bit_length()):
        rows = [
            choose_lanes(builder, rows[i], rows[i + half], chosen) for i in range(half) for chosen in halves
        ]
    return rows


@intrinsic
def store_transposed(
    typing: Any, source: Any, rows: Any, size: Any, target: Any, index: Any, step: Any
) -> Any:
    """16 rows of 16 elements as columns: target[index + j * step + i] = source[rows[i] * size + j].

    target is a pointer to float32, rows one to int64.
    """
    element, integer = source.dtype, types.int64

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        source, numbers, size, target, index, step = args
        memory = ir.VectorType(context.get_value_type(element), 16)
        rows = []
        for i in range(16):
            start = builder.mul(builder.load(builder.gep(numbers, [I64(i)])), size)
            rows.append(builder.load(_address(builder, source, start, memory), align=bytes_of(element)))
        for j, row in enumerate(interleaved(builder, rows)):
            column = widen(builder, element, row)
            place = builder.add(index, builder.mul(step, I64(j)))
            builder.store(column, _address(builder, target, place, column.type), align=4)
        return context.get_dummy_value()

    return types.void(source, rows, integer, target, integer, integer), lower
