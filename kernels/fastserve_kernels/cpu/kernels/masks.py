"""Loads and stores of the first elements of a vector."""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

from fastserve_kernels.cpu.kernels import cpu_features
from fastserve_kernels.cpu.kernels.elements import FLOAT, I32, I64, repeated

HAS_AVX512 = cpu_features.has("avx512bw")
"""Whether there are masks for elements of any size, and 32 registers of 64 bytes."""


def _first_lanes(builder: ir.IRBuilder, count: ir.Value, lanes: int) -> ir.Value:
    lane = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
    return builder.icmp_signed("<", lane, repeated(builder, builder.trunc(count, I32), lanes))


def _short_name(element: ir.Type) -> str:
    return "f32" if element == FLOAT else f"i{element.width}"


def _bytes_of(element: ir.Type) -> int:
    return 4 if element == FLOAT else int(element.width) // 8


def masked_load(builder: ir.IRBuilder, place: ir.Value, memory: ir.VectorType, count: ir.Value) -> ir.Value:
    """The vector at a place, of which the first `count` elements are there; zeros follow these."""
    place = builder.bitcast(place, memory.as_pointer())
    if not HAS_AVX512:
        return _load_by_way_of_the_stack(builder, place, count)
    mask, none = _first_lanes(builder, count, memory.count), ir.Constant(memory, None)
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(memory, [place.type, I32, mask.type, memory]),
        f"llvm.masked.load.v{memory.count}{_short_name(memory.element)}.p0",
    )
    return builder.call(function, [place, I32(1), mask, none])


def load_elements(builder: ir.IRBuilder, place: ir.Value, memory: ir.VectorType, count: ir.Value) -> ir.Value:
    """`masked_load` where all elements are there as a rule: making a mask of 64 takes ten instructions."""
    if not HAS_AVX512:
        return masked_load(builder, place, memory, count)
    with builder.if_else(builder.icmp_signed(">=", count, I64(memory.count))) as (all_there, some_there):
        with all_there:
            whole = builder.load(builder.bitcast(place, memory.as_pointer()), align=_bytes_of(memory.element))
            end_of_whole = builder.block
        with some_there:
            part = masked_load(builder, place, memory, count)
            end_of_part = builder.block
    result = builder.phi(memory)
    result.add_incoming(whole, end_of_whole)
    result.add_incoming(part, end_of_part)
    return result


def _load_by_way_of_the_stack(builder: ir.IRBuilder, place: ir.Value, count: ir.Value) -> ir.Value:
    """`masked_load` where LLVM would have a branch for each lane."""
    memory = place.type.pointee
    buffer = cgutils.alloca_once(builder, memory)
    whole = builder.icmp_signed(">=", count, I64(memory.count))
    with cgutils.if_unlikely(builder, builder.not_(whole)):
        builder.store(ir.Constant(memory, None), buffer)
        _copy_elements(builder, buffer, place, count)
    source = builder.select(whole, place, buffer)
    return builder.load(source, align=_bytes_of(memory.element))


def _copy_elements(builder: ir.IRBuilder, target: ir.Value, source: ir.Value, count: ir.Value) -> None:
    """As many of a vector's elements from a place to another; none if the count is negative."""
    count = builder.select(builder.icmp_signed(">", count, I64(0)), count, I64(0))
    cgutils.raw_memcpy(builder, target, source, count, _bytes_of(target.type.pointee.element))


def masked_store(builder: ir.IRBuilder, raw: ir.Value, place: ir.Value, count: ir.Value) -> None:
    """Stores the first `count` elements of a vector to a place."""
    if not HAS_AVX512:
        buffer = cgutils.alloca_once(builder, raw.type)
        builder.store(raw, buffer)
        _copy_elements(builder, place, buffer, count)
        return
    mask = _first_lanes(builder, count, raw.type.count)
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(ir.VoidType(), [raw.type, place.type, I32, mask.type]),
        f"llvm.masked.store.v{raw.type.count}{_short_name(raw.type.element)}.p0",
    )
    builder.call(function, [raw, place, I32(1), mask])
