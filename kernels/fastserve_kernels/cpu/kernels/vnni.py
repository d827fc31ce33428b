"""Weights and activations in words of 32 bits: the layout of the dot products of VNNI and BF16.

A word is what a lane of a vector of 16 takes in one multiplication: one float32, two bfloat16 or four int8 of
adjacent columns. A vector of weights has one word each of 16 rows, so that a sum over columns needs no sum
over lanes, and what belongs to a row, as its scale does, is a vector as well. Pointers carry the names of
these words as their types, by which the functions here are chosen:

| type | a vector of 64 bytes | becomes |
|---|---|---|
| `single` | 16 rows x 1 float32 | itself |
| `pair` | 16 rows x 2 bfloat16 | itself |
| `quad` | 16 rows x 4 int8 | itself |
| `nibbles` | 16 rows x 8 codes of 4 bits | 8 `single` or 4 `pair`, looked up in a table of 16; 2 `quad` |
| `codes` | 16 rows x 4 codes of 8 bits | 4 `single` or 2 `pair`, looked up in a table of 128, and a sign |

Products of quads are those of `byte_products`; what looks up or multiplies pairs needs AVX-512 with its
extensions BF16 and VBMI. LLVM has changed some types of instructions between its versions, and takes the
older ones, which are used here, as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import models, register_model

from fastserve_kernels.cpu.kernels.byte_products import HAS_VNNI, Vectors, add_byte_products
from fastserve_kernels.cpu.kernels.elements import FLOAT, I8, I16, I32, I64, bfloat16, invoke, repeated, same
from fastserve_kernels.cpu.kernels.vectors import Vector, intrinsic

VECTOR_ROWS = 16
"""Rows of a vector."""
PANEL_VECTORS = 2
"""Vectors of weights that meet each word of the activations while it is in a register."""
AHEAD = 8192
"""Bytes by which weights are asked for before they are needed: as many as are ever multiplied together."""

WORDS, SUMS = ir.VectorType(I32, VECTOR_ROWS), ir.VectorType(FLOAT, VECTOR_ROWS)
SHORTS, BYTES = ir.VectorType(I16, 2 * VECTOR_ROWS), ir.VectorType(I8, 4 * VECTOR_ROWS)


class Word(types.Type):
    """The type of what lies in memory: so many columns of a row in 32 bits."""

    def __init__(self, name: str, columns: int) -> None:
        self.columns = columns
        super().__init__(name)


@register_model(Word)
class _WordModel(models.PrimitiveModel):
    def __init__(self, manager: Any, word: Word) -> None:
        super().__init__(manager, word, I32)


single, pair, quad = Word("single", 1), Word("pair", 2), Word("quad", 4)
nibbles, codes = Word("nibbles", 8), Word("codes", 4)


def of_elements(element: types.Type) -> Word:
    """The words that activations of these elements become."""
    return pair if element == bfloat16 else single


@intrinsic
def columns_of(typing: Any, words: Any) -> Any:
    """The columns of a word, a constant."""

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return I64(words.dtype.columns)

    return types.int64(words), lower


def broadcast(builder: ir.IRBuilder, value: ir.Value, lanes: int = VECTOR_ROWS) -> ir.Value:
    """A vector of one value."""
    return repeated(builder, value, lanes)


def address_of(builder: ir.IRBuilder, pointer: ir.Value, index: ir.Value, kind: ir.Type) -> ir.Value:
    """Where pointer[index] lies if the memory is seen as of this type."""
    return builder.gep(builder.bitcast(pointer, kind.as_pointer()), [index])


def load(builder: ir.IRBuilder, pointer: ir.Value, index: ir.Value, kind: ir.Type = WORDS) -> ir.Value:
    """pointer[index] of vectors."""
    return builder.load(address_of(builder, pointer, index, kind), align=4)


def store(builder: ir.IRBuilder, vector: ir.Value, pointer: ir.Value, index: ir.Value) -> None:
    """pointer[index] = vector."""
    builder.store(vector, address_of(builder, pointer, index, vector.type), align=4)


def prefetch(builder: ir.IRBuilder, place: ir.Value) -> None:
    """Has the memory AHEAD of a place brought into the cache while other things go on."""
    place = builder.gep(builder.bitcast(place, I8.as_pointer()), [I64(AHEAD)])
    reading, keep_close, data = I32(0), I32(3), I32(1)
    invoke(builder, "prefetch.p0", ir.VoidType(), place, reading, keep_close, data)


def multiply_words(
    builder: ir.IRBuilder, stored: Word, word: Word, total: ir.Value, weights: Vectors, x: Vectors
) -> ir.Value:
    """total + weights * x of `words_together` vectors of words each."""
    if word == quad:
        return add_byte_products(builder, total, weights, x, stored == nibbles)
    if word == pair:
        return invoke(builder, "x86.avx512bf16.dpbf16ps.512", SUMS, total, weights[0], x[0])
    factors = [builder.bitcast(each[0], SUMS) for each in (weights, x)]
    return invoke(builder, "fma.v16f32", SUMS, *factors, total)


def words_together(stored: Word, word: Word) -> int:
    """Vectors of words that `multiply_words` takes at once: two of which each alone would need a sum of its
    own in 32 bits."""
    return 2 if word == quad and stored == nibbles and not HAS_VNNI else 1


Unpack = Callable[[ir.Value], "list[ir.Value]"]
"""The words of a vector in memory, in the order of the columns."""


def unpacker(builder: ir.IRBuilder, stored: Word, word: Word, table: ir.Value) -> Unpack:
    """What makes words of what is stored; loads the table."""
    if stored == word:
        return lambda vector: [vector]
    if stored == nibbles and word == quad:
        return _split_nibbles(builder)
    if stored == nibbles:
        values = load(builder, table, I64(0), SUMS if word == single else SHORTS)
        return lambda vector: _look_up_nibbles(builder, word, values, vector)
    quarters = [load(builder, table, I64(i), BYTES) for i in range(4)]
    return lambda vector: _look_up_codes(builder, word, quarters, vector)


def _look_up_nibbles(builder: ir.IRBuilder, word: Word, table: ir.Value, vector: ir.Value) -> list[ir.Value]:
    """Nibble j of a lane's low half is column 2 j, that of its high half column 2 j + 1. A permutation looks
    at no more bits of an index than it needs: 4 for `single`, 5 for `pair`, whose table is there twice."""
    found = []
    for j in range(4):
        if word == single:
            for shift in (4 * j, 4 * j + 16):
                index = builder.lshr(vector, same(WORDS, shift))
                value = invoke(builder, "x86.avx512.permvar.sf.512", SUMS, table, index)
                found.append(builder.bitcast(value, WORDS))
        else:
            index = builder.bitcast(builder.lshr(vector, same(WORDS, 4 * j)), SHORTS)
            value = invoke(builder, "x86.avx512.permvar.hi.512", SHORTS, table, index)
            found.append(builder.bitcast(value, WORDS))
    return found


def _split_nibbles(builder: ir.IRBuilder) -> Unpack:
    """The low halves of the bytes, then the high ones: columns 0, 4, 1, 5, then 2, 6, 3, 7."""
    mask = builder.bitcast(same(BYTES, 15), WORDS)

    def unpack(vector: ir.Value) -> list[ir.Value]:
        return [builder.and_(half, mask) for half in (vector, builder.lshr(vector, same(WORDS, 4)))]

    return unpack


def _look_up_codes(
    builder: ir.IRBuilder, word: Word, table: list[ir.Value], vector: ir.Value
) -> list[ir.Value]:
    """The low seven bits of a code look up the low and the high byte of a bfloat16, the eighth is its sign.
    Each 16 bytes of the vector have the first two columns of four rows, then their next two."""
    index = builder.bitcast(vector, BYTES)
    low, high = (
        invoke(builder, "x86.avx512.vpermi2var.qi.512", BYTES, table[i], index, table[i + 1]) for i in (0, 2)
    )
    high = builder.or_(high, builder.and_(index, same(BYTES, -128)))
    found = []
    for first in (0, 8):
        lanes = [16 * q + first + i + half for q in range(4) for i in range(8) for half in (0, 64)]
        both = builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, 64), lanes))
        found.append(builder.bitcast(both, WORDS))
    if word == pair:
        return found
    return [
        column
        for both in found
        for column in (builder.shl(both, same(WORDS, 16)), builder.and_(both, same(WORDS, -0x10000)))
    ]


@intrinsic
def unpack(typing: Any, stored: Any, table: Any, count: Any, target: Any) -> Any:
    """The words of `count` vectors of each panel, to target."""

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        source, table_, count_, to = args
        words_of = unpacker(builder, stored.dtype, target.dtype, table_)
        with cgutils.for_range(builder, count_) as loop:
            first = builder.mul(loop.index, I64(PANEL_VECTORS))
            for vector in range(PANEL_VECTORS):
                index = builder.add(first, I64(vector))
                prefetch(builder, address_of(builder, source, index, WORDS))
                found = words_of(load(builder, source, index))
                for j, words in enumerate(found):
                    place = builder.add(builder.mul(first, I64(len(found))), I64(j * PANEL_VECTORS + vector))
                    store(builder, words, to, place)
        return context.get_dummy_value()

    return types.void(stored, table, types.int64, target), lower


@intrinsic
def reduce_add_int32(typing: Any, memory: Any, index: Any) -> Any:
    """The sum of the VECTOR_ROWS int32 at memory[index]."""

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        place = builder.gep(args[0], [args[1]])
        total = invoke(builder, f"vector.reduce.add.v{VECTOR_ROWS}i32", I32, load(builder, place, I64(0)))
        return builder.sext(total, I64)

    return types.int64(memory, types.int64), lower


@intrinsic
def int32_to_float32_less(typing: Any, memory: Any, index: Any, excess: Any) -> Any:
    """The VECTOR_ROWS int32 at memory[index], less the excess, as float32."""

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        integers = load(builder, builder.gep(args[0], [args[1]]), I64(0))
        less = broadcast(builder, builder.trunc(args[2], I32))
        return builder.sitofp(builder.sub(integers, less), SUMS)

    return Vector(VECTOR_ROWS)(memory, types.int64, types.int64), lower
