"""Activations as words, those of up to MAX_TOKENS tokens side by side: one group, [words of a row, W].

W is the number of tokens rounded up to a power of two; what lies beyond the tokens is never looked at. Rows
are filled up with zeros. bfloat16 becomes pairs, float32 and float16 single words; or all of them quads,
which are x / scale rounded half to even.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types

from fastserve_kernels.cpu.kernels import vectors
from fastserve_kernels.cpu.kernels.byte_products import add_byte_products
from fastserve_kernels.cpu.kernels.elements import (
    FLOAT,
    I8,
    I16,
    I32,
    I64,
    choose_lanes,
    float32,
    invoke,
    repeated,
    same,
    widen,
)
from fastserve_kernels.cpu.kernels.kernel import Elements, Floats
from fastserve_kernels.cpu.kernels.masks import load_elements, masked_load
from fastserve_kernels.cpu.kernels.products import MAX_TOKENS, for_each_count, width_for, width_of
from fastserve_kernels.cpu.kernels.vectors import (
    LANES,
    as_float32,
    at,
    interleaved,
    intrinsic,
    load_masked,
    pointer_cast,
    reduce_add,
    splat,
)
from fastserve_kernels.cpu.kernels.vnni import (
    BYTES,
    VECTOR_ROWS,
    WORDS,
    Word,
    broadcast,
    columns_of,
    load,
    nibbles,
    of_elements,
    quad,
    single,
    store,
)
from fastserve_kernels.reference import SMALLEST_STEP

Words = Any
"""A pointer to words."""
QUAD_COLUMNS = 4 * VECTOR_ROWS
"""Columns of a vector of quads."""
HALF_COLUMNS = QUAD_COLUMNS // 2
"""Those of the smallest block."""
TO_INTEGER = 1.5 * 2**23
"""A float32 below 2^22 that this is added to is rounded, half to even, to its last bits."""
OF_TOKENS = ir.VectorType(FLOAT, MAX_TOKENS)
"""What there is one of for each token that is packed."""


@intrinsic
def as_words(typing: Any, x: Any, memory: Any) -> Any:
    """The pointer `memory` as one to the words that x becomes."""
    words = types.CPointer(of_elements(x.dtype))

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.bitcast(args[1], context.get_value_type(words))

    return words(x, memory), lower


@intrinsic
def as_elements(typing: Any, x: Any, memory: Any) -> Any:
    """The pointer `memory` as one to elements like those of x."""

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.bitcast(args[1], context.get_value_type(x))

    return x(x, memory), lower


as_quads = pointer_cast(quad)


@njit(error_model="numpy")
def pack(x: Elements, start: int, stride: int, dim: int, padded: int, tokens: int, words: Words) -> None:
    """A group of tokens, whose rows of `dim` elements begin at x[start] and lie `stride` apart, filled up to
    `padded` columns, a multiple of 32."""
    step = VECTOR_ROWS * columns_of(words)
    width = width_for(tokens)
    unused = as_float32(words)
    for i in range(0, padded, step):
        to = at(words, i // columns_of(words) * width)
        _pack_words(x, start + i, stride, dim - i, tokens, to, unused, unused)


@intrinsic
def _largest_magnitude(typing: Any, x: Any, index: Any, left: Any) -> Any:
    """Of HALF_COLUMNS elements from x[index] on, of which there are `left`, as float32; NaN if one of them is
    infinite or no number. Magnitudes are in the order of their bits, in which infinity comes behind the
    finite ones and NaN behind infinity."""
    floats = types.CPointer(x.dtype)

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        source, index_, left_ = args
        size = x.dtype.bitwidth
        bits = ir.VectorType(ir.IntType(size), HALF_COLUMNS)
        memory = ir.VectorType(FLOAT, HALF_COLUMNS) if x.dtype == float32 else bits
        raw = load_elements(builder, builder.gep(source, [index_]), memory, left_)
        magnitudes = builder.and_(builder.bitcast(raw, bits), same(bits, (1 << (size - 1)) - 1))
        largest = invoke(builder, f"vector.reduce.umax.v{HALF_COLUMNS}i{size}", bits.element, magnitudes)
        several = ir.VectorType(memory.element, 4)
        wide = widen(builder, x.dtype, builder.bitcast(repeated(builder, largest, 4), several))
        value = builder.extract_element(wide, I32(0))
        is_finite = builder.fcmp_ordered("<", value, FLOAT(float("inf")))
        return builder.select(is_finite, value, FLOAT(float("nan")))

    return types.float32(floats, types.int64, types.int64), lower


@njit(error_model="numpy")
def _largest(x: Elements, first: int, columns: int) -> Any:
    """The largest magnitude of so many elements; NaN if one is infinite or no number."""
    largest = float32(0)
    for i in range(0, columns, HALF_COLUMNS):
        found = _largest_magnitude(x, first + i, columns - i)
        if found > largest or found != found:  # what is no number stays
            largest = found
    return largest


@njit(error_model="numpy")
def quantize(
    x: Elements,
    start: int,
    stride: int,
    dim: int,
    padded: int,
    tokens: int,
    words: Words,
    x_scales: Floats,
    sums: Floats,
) -> None:
    """A group of tokens as quads, `padded` a multiple of 64. x_scales [tokens] become max|x| / 127 of each
    token; sums [tokens, VECTOR_ROWS] int32 the sums of the quads in lane i of each vector."""
    width = width_for(tokens)
    for t in range(tokens):
        x_scales[t] = _largest(x, start + t * stride, dim) / float32(127)
        vectors.store(sums, t * VECTOR_ROWS, splat(float32(0), LANES))
    for i in range(0, padded, 4 * VECTOR_ROWS):
        _pack_words(x, start + i, stride, dim - i, tokens, at(words, i // 4 * width), x_scales, sums)


@njit(error_model="numpy")
def quantize_groups(
    x: Elements,
    start: int,
    stride: int,
    dim: int,
    padded: int,
    block: int,
    weights: Words,
    tokens: int,
    words: Words,
    x_scales: Floats,
    sums: Floats,
    sum_stride: int,
) -> None:
    """A group of tokens as quads, in the order in which those of `weights` come. `padded` is a multiple of
    32, and words are written up to a multiple of 64.

    Each `block` columns of a token, 32 or a multiple of 64, have a scale of their own, max|x| / 127: x_scales
    [padded / block, MAX_TOKENS]. What each block adds up to as it is rounded goes into sums [groups,
    MAX_TOKENS], `sum_stride` further on for the next block: MAX_TOKENS, or 0 where all are one group."""
    width = width_for(tokens)
    for t in range(tokens):
        sums[t] = 0
        for b in range((padded + block - 1) // block):
            columns = min(block, dim - b * block)
            largest = _largest(x, start + t * stride + b * block, columns)
            x_scales[b * MAX_TOKENS + t] = largest / float32(127)
            sums[b * sum_stride + t] = 0
    second = 1 if block < QUAD_COLUMNS else 0
    for i in range(0, padded, QUAD_COLUMNS):
        b = i // block
        if i + 32 >= padded:
            second = 0
        of_scales, of_sums = at(x_scales, b * MAX_TOKENS), at(sums, b * sum_stride)
        next_scales, next_sums = at(of_scales, second * MAX_TOKENS), at(of_sums, second * sum_stride)
        to = at(words, i // 4 * width)
        _pack_grouped(
            x, start + i, stride, dim - i, weights, tokens, to, of_scales, next_scales, of_sums, next_sums
        )


@intrinsic
def _pack_words(
    typing: Any,
    x: Any,
    start: Any,
    stride: Any,
    left: Any,
    tokens: Any,
    target: Any,
    x_scales: Any,
    sums: Any,
) -> Any:
    """The next VECTOR_ROWS words of each token."""
    word, integer = target.dtype, types.int64

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        source, start_, stride_, left_, token_count, to, x_scales_, sums_ = args

        def body(tokens_: int) -> None:
            rows = []
            for t in range(tokens_):
                place = builder.gep(source, [builder.add(start_, builder.mul(stride_, I64(t)))])
                if word == quad:
                    rows.append(
                        _round_words(builder, x.dtype, place, left_, builder.gep(x_scales_, [I64(t)]))
                    )
                    added = _add_bytes(builder, load(builder, sums_, I64(t)), rows[t])
                    store(builder, added, sums_, I64(t))
                else:
                    rows.append(_load_words(builder, x.dtype, word, place, left_))
            _store_interleaved(builder, rows, to)

        for_each_count(builder, token_count, body)
        return context.get_dummy_value()

    return types.void(x, integer, integer, integer, integer, target, x_scales, sums), lower


def _store_interleaved(builder: ir.IRBuilder, rows: list[ir.Value], to: ir.Value) -> list[ir.Value]:
    """The words of each token side by side with those of the others; returns them so."""
    rows = interleaved(builder, rows + rows[-1:] * (width_of(len(rows)) - len(rows)))
    for i, row in enumerate(rows):
        store(builder, row, to, I64(i))
    return rows


@intrinsic
def _pack_grouped(
    typing: Any,
    x: Any,
    start: Any,
    stride: Any,
    left: Any,
    weights: Any,
    tokens: Any,
    target: Any,
    low_scales: Any,
    high_scales: Any,
    low_sums: Any,
    high_sums: Any,
) -> Any:
    """The next VECTOR_ROWS words of each token, of which each half has a scale and a sum by token."""
    integer, is_permuted = types.int64, weights.dtype == nibbles

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        source, start_, stride_, left_, _, token_count, to, *of_halves = args

        def body(tokens_: int) -> None:
            width = width_of(tokens_)
            scales = [load(builder, pointer, I64(0), OF_TOKENS) for pointer in of_halves[:2]]
            inverses = [_inverses(builder, each) for each in scales]
            rows = []
            for t in range(tokens_):
                place = builder.gep(source, [builder.add(start_, builder.mul(stride_, I64(t)))])
                of_token = [builder.extract_element(each, I32(t)) for each in inverses]
                quads = _round_halves(builder, x.dtype, place, left_, of_token)
                rows.append(builder.bitcast(_permuted(builder, quads) if is_permuted else quads, WORDS))
            words = _store_interleaved(builder, rows, to)
            for half, (of_half, sums) in enumerate(zip(scales, of_halves[2:], strict=True)):
                _add_half(builder, words, half, choose_lanes(builder, of_half, of_half, range(width)), sums)

        for_each_count(builder, token_count, body)
        return context.get_dummy_value()

    arguments = (low_scales, high_scales, low_sums, high_sums)
    return types.void(x, integer, integer, integer, weights, integer, target, *arguments), lower


def _inverses(builder: ir.IRBuilder, scales: ir.Value) -> ir.Value:
    """1 / scale of each token; 0 where the scale is 0 or no number."""
    is_normal = builder.fcmp_ordered(">", scales, same(OF_TOKENS, SMALLEST_STEP))
    return builder.select(is_normal, builder.fdiv(same(OF_TOKENS, 1.0), scales), same(OF_TOKENS, 0.0))


def _round_halves(
    builder: ir.IRBuilder, element: types.Type, place: ir.Value, left: ir.Value, inverses: list[ir.Value]
) -> ir.Value:
    """The next QUAD_COLUMNS of a row of which there are `left` elements, each half times its inverse, as
    bytes."""
    floats, integers = ir.VectorType(FLOAT, QUAD_COLUMNS), ir.VectorType(I32, QUAD_COLUMNS)
    kind = ir.VectorType(FLOAT if element == float32 else I16, QUAD_COLUMNS)
    values = widen(builder, element, load_elements(builder, place, kind, left))
    low, high = (broadcast(builder, each, HALF_COLUMNS) for each in inverses)
    by = choose_lanes(builder, low, high, range(QUAD_COLUMNS))
    rounded = builder.fadd(builder.fmul(values, by), same(floats, TO_INTEGER))
    return builder.trunc(builder.bitcast(rounded, integers), BYTES)


def _add_half(
    builder: ir.IRBuilder, words: list[ir.Value], half: int, scales: ir.Value, sums: ir.Value
) -> None:
    """Adds what half of the columns of each token add up to, times its scale, to its sum. `words`: those of
    all tokens side by side; scales: of as many tokens; sums: where theirs lie."""
    width = scales.type.count
    if width == 1:
        found = _add_bytes(builder, same(WORDS, 0), words[0])
        count = VECTOR_ROWS // 2
        found = choose_lanes(builder, found, found, range(half * count, (half + 1) * count))
    else:
        found = same(WORDS, 0)
        for each in words[half * width // 2 : (half + 1) * width // 2]:
            found = _add_bytes(builder, found, each)
    while (count := found.type.count) > width:  # lanes of a token lie `width` apart
        parts = range(count // 2), range(count // 2, count)
        found = builder.add(*(choose_lanes(builder, found, found, part) for part in parts))
    of_half = builder.fmul(builder.sitofp(found, scales.type), scales)
    store(builder, builder.fadd(load(builder, sums, I64(0), scales.type), of_half), sums, I64(0))


def _permuted(builder: ir.IRBuilder, quads: ir.Value) -> ir.Value:
    """The bytes in the order in which nibbles are split: of each eight columns 0, 4, 1, 5, 2, 6, 3, 7."""
    lanes = [8 * i + column for i in range(QUAD_COLUMNS // 8) for column in (0, 4, 1, 5, 2, 6, 3, 7)]
    return builder.shuffle_vector(quads, quads, ir.Constant(ir.VectorType(I32, QUAD_COLUMNS), lanes))


def _load_words(
    builder: ir.IRBuilder, element: types.Type, word: Word, place: ir.Value, left: ir.Value
) -> ir.Value:
    """VECTOR_ROWS words of a row of which there are `left` elements."""
    count = VECTOR_ROWS * word.columns
    kind = FLOAT if element == float32 else I16
    raw = masked_load(builder, place, ir.VectorType(kind, count), left)
    return builder.bitcast(widen(builder, element, raw) if word == single else raw, WORDS)


def _round_words(
    builder: ir.IRBuilder, element: types.Type, place: ir.Value, left: ir.Value, scale: ir.Value
) -> ir.Value:
    """VECTOR_ROWS quads of a row of which there are `left` elements; 0 where the scale is 0."""
    count = 4 * VECTOR_ROWS
    floats, integers = ir.VectorType(FLOAT, count), ir.VectorType(I32, count)
    raw = masked_load(builder, place, ir.VectorType(FLOAT if element == float32 else I16, count), left)
    by = builder.load(scale)
    by = builder.select(builder.fcmp_ordered(">", by, FLOAT(0.0)), by, FLOAT(float("inf")))
    rounded = invoke(
        builder,
        f"rint.v{count}f32",
        floats,
        builder.fdiv(widen(builder, element, raw), broadcast(builder, by, count)),
    )
    return builder.bitcast(builder.trunc(builder.fptosi(rounded, integers), ir.VectorType(I8, count)), WORDS)


def _add_bytes(builder: ir.IRBuilder, total: ir.Value, quads: ir.Value) -> ir.Value:
    """total + the four bytes of each word."""
    ones = builder.bitcast(same(BYTES, 1), WORDS)
    return add_byte_products(builder, total, [ones], [quads], are_small=True)


@njit(error_model="numpy")
def sum_groups(
    x: Elements, start: int, stride: int, dim: int, group: int, groups: int, tokens: int, sums: Floats
) -> None:
    """sums [groups, MAX_TOKENS] of `group` columns each, of the rows of a group of tokens."""
    for t in range(tokens):
        row = start + t * stride
        for g in range(groups):
            found = splat(float32(0), LANES)
            for i in range(g * group, min(dim, (g + 1) * group), LANES):
                found = found + load_masked(x, row + i, dim - i)
            sums[g * MAX_TOKENS + t] = reduce_add(found)
