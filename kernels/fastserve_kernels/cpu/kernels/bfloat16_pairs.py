"""Vectors of pairs of bfloat16, and their dot products: AVX-512's extension BF16 adds two products at once.

A pair is a word of 32 bits: two numbers of adjacent places of a sum, the first in the low half. The products
are exact, and their sums float32. Without that extension nothing here is ever run.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from fastserve_kernels.cpu.kernels import cpu_features
from fastserve_kernels.cpu.kernels.elements import I32, I64, bfloat16, bytes_of, invoke, same, widen
from fastserve_kernels.cpu.kernels.masks import masked_load
from fastserve_kernels.cpu.kernels.vectors import interleaved, intrinsic, pointer_cast
from fastserve_kernels.cpu.kernels.vnni import SUMS, VECTOR_ROWS, WORDS, broadcast

HAS_DOT_PRODUCTS = cpu_features.has("avx512bw", "avx512bf16")
PAIR_COLUMNS = 2 * VECTOR_ROWS
"""Columns of a vector of pairs."""

as_int32 = pointer_cast(types.int32)


@intrinsic
def uses_pairs(typing: Any, pointer: Any) -> Any:
    """Whether products of such elements are of pairs, a constant: the branch not taken costs nothing."""

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return ir.IntType(1)(HAS_DOT_PRODUCTS and pointer.dtype == bfloat16)

    return types.boolean(pointer), lower


def _pairs_of(builder: ir.IRBuilder, low: ir.Value, high: ir.Value) -> ir.Value:
    """Of vectors of float32 that are bfloat16."""
    words = ir.VectorType(I32, low.type.count)
    low = builder.lshr(builder.bitcast(low, words), same(words, 16))
    high = builder.and_(builder.bitcast(high, words), same(words, -0x10000))
    return builder.or_(low, high)


@intrinsic
def dot_pairs(typing: Any, total: Any, words: Any, index: Any, word: Any) -> Any:
    """total + the dot products of the pairs words[index : index + lanes] with one pair."""
    lanes = total.lanes

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        if not HAS_DOT_PRODUCTS:
            return args[0]
        total_, pointer, first, word_ = args
        by, parts = broadcast(builder, word_), []
        for start in range(0, lanes, VECTOR_ROWS):
            of_part = ir.Constant(WORDS, list(range(start, start + VECTOR_ROWS)))
            part = builder.shuffle_vector(total_, total_, of_part)
            place = builder.gep(pointer, [builder.add(first, I64(start))])
            pairs = builder.load(builder.bitcast(place, WORDS.as_pointer()), align=4)
            parts.append(invoke(builder, "x86.avx512bf16.dpbf16ps.512", SUMS, part, pairs, by))
        while len(parts) > 1:
            count = ir.VectorType(I32, 2 * parts[0].type.count)
            both = ir.Constant(count, list(range(count.count)))
            parts = [builder.shuffle_vector(parts[i], parts[i + 1], both) for i in range(0, len(parts), 2)]
        return parts[0]

    return total(total, words, types.int64, types.int32), lower


@intrinsic
def store_pairs(typing: Any, low: Any, high: Any, words: Any, index: Any) -> Any:
    """words[index : index + lanes] = the pairs of each lane of two vectors, which hold bfloat16."""

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        pairs = _pairs_of(builder, args[0], args[1])
        place = builder.bitcast(builder.gep(args[2], [args[3]]), pairs.type.as_pointer())
        builder.store(pairs, place, align=4)
        return context.get_dummy_value()

    return types.void(low, high, words, types.int64), lower


@intrinsic
def store_transposed_pairs(
    typing: Any, source: Any, rows: Any, size: Any, left: Any, target: Any, index: Any, step: Any
) -> Any:
    """Pairs of the columns of 16 rows: target[index + j * step + i] = source[rows[i] * size + 2 j, and + 1].

    For j from 0 to 15; there are `left` columns, and zeros for those beyond them. target is a pointer to
    words.
    """
    element, integer = source.dtype, types.int64

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        source, numbers, size_, left_, target_, index_, step_ = args
        kind = ir.VectorType(context.get_value_type(element), PAIR_COLUMNS)
        starts = [
            builder.gep(source, [builder.mul(builder.load(builder.gep(numbers, [I64(i)])), size_)])
            for i in range(VECTOR_ROWS)
        ]

        def store_all(load: Any) -> None:
            found = [_pairs(builder, element, load(start)) for start in starts]
            for j, words in enumerate(interleaved(builder, found)):
                place = builder.gep(target_, [builder.add(index_, builder.mul(step_, I64(j)))])
                builder.store(words, builder.bitcast(place, WORDS.as_pointer()), align=4)

        def load_whole(start: ir.Value) -> ir.Value:
            return builder.load(builder.bitcast(start, kind.as_pointer()), align=bytes_of(element))

        def load_part(start: ir.Value) -> ir.Value:
            return masked_load(builder, start, kind, left_)

        with builder.if_else(builder.icmp_signed(">=", left_, I64(PAIR_COLUMNS))) as (whole, part):
            with whole:
                store_all(load_whole)
            with part:
                store_all(load_part)
        return context.get_dummy_value()

    return types.void(source, rows, integer, integer, target, integer, integer), lower


def _pairs(builder: ir.IRBuilder, element: types.Type, raw: ir.Value) -> ir.Value:
    """Adjacent elements, which bfloat16 holds exactly, as pairs."""
    if element == bfloat16:
        return builder.bitcast(raw, WORDS)
    floats = widen(builder, element, raw)
    even, odd = (
        builder.shuffle_vector(floats, floats, ir.Constant(WORDS, list(range(first, PAIR_COLUMNS, 2))))
        for first in (0, 1)
    )
    return _pairs_of(builder, even, odd)
