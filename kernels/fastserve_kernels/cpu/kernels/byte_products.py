"""Products of bytes, four of a word added up: what each processor has for that, on vectors of words.

VNNI has one instruction, in the registers of AVX-512 or, as AVX-VNNI or with AVX-512VL, in those of AVX2.
Without it two products are added up in 16 bits, which must hold them, then two of these in 32. Codes of 4
bits are small enough for four products. Bytes are not: there weights have a sign, which goes over to the
activations, so that 2 * 128 * 127 is the largest sum.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from fastserve_kernels.cpu.kernels import cpu_features
from fastserve_kernels.cpu.kernels.elements import I8, I16, I32, invoke, same

HAS_VNNI = cpu_features.has_vnni()
LANES = 16 if cpu_features.has_wide_vnni() else 8
"""Words of a register."""
WORDS = ir.VectorType(I32, LANES)
SHORTS, BYTES = ir.VectorType(I16, 2 * LANES), ir.VectorType(I8, 4 * LANES)

Vectors = list[ir.Value]
Factors = list[tuple[ir.Value, ir.Value]]
"""Weights, and the activations that they meet."""


def add_byte_products(
    builder: ir.IRBuilder, total: ir.Value, weights: Vectors, x: Vectors, are_small: bool
) -> ir.Value:
    """total + weights * x of vectors of words, one or two of each. `are_small`: weights are from 0 to 15;
    else they have no sign where there is VNNI, and one where there is none."""
    add: Callable[[ir.IRBuilder, ir.Value, Factors], ir.Value] = _add_dot_products
    if not HAS_VNNI:
        add = _add_small_products if are_small else _add_signed_products
    sums = []
    for first in range(0, total.type.count, LANES):
        of_total, *of_factors = [_lanes(builder, each, first) for each in (total, *weights, *x)]
        factors = zip(of_factors[: len(weights)], of_factors[len(weights) :], strict=True)
        sums.append(add(builder, of_total, list(factors)))
    return sums[0] if len(sums) == 1 else _joined(builder, *sums)


def _lanes(builder: ir.IRBuilder, vector: ir.Value, first: int) -> ir.Value:
    if vector.type.count == LANES:
        return vector
    return builder.shuffle_vector(vector, vector, ir.Constant(WORDS, list(range(first, first + LANES))))


def _joined(builder: ir.IRBuilder, low: ir.Value, high: ir.Value) -> ir.Value:
    lanes = ir.VectorType(I32, 2 * LANES)
    return builder.shuffle_vector(low, high, ir.Constant(lanes, list(range(2 * LANES))))


def _add_dot_products(builder: ir.IRBuilder, total: ir.Value, factors: Factors) -> ir.Value:
    for weights, x in factors:
        total = invoke(builder, f"x86.avx512.vpdpbusd.{32 * LANES}", WORDS, total, weights, x)
    return total


def _add_small_products(builder: ir.IRBuilder, total: ir.Value, factors: Factors) -> ir.Value:
    pairs = [_add_pairs(builder, weights, x) for weights, x in factors]
    return builder.add(total, _add_shorts(builder, pairs[0] if len(pairs) == 1 else builder.add(*pairs)))


def _add_signed_products(builder: ir.IRBuilder, total: ir.Value, factors: Factors) -> ir.Value:
    for each in factors:
        weights, x = (builder.bitcast(vector, BYTES) for vector in each)
        with_sign = invoke(builder, "x86.avx2.psign.b", BYTES, x, weights)
        without = invoke(builder, f"abs.v{BYTES.count}i8", BYTES, weights, ir.IntType(1)(0))
        total = builder.add(total, _add_shorts(builder, _add_pairs(builder, without, with_sign)))
    return total


def _add_pairs(builder: ir.IRBuilder, weights: ir.Value, x: ir.Value) -> ir.Value:
    """Sums of two products of bytes without and with a sign."""
    weights, x = builder.bitcast(weights, BYTES), builder.bitcast(x, BYTES)
    return invoke(builder, "x86.avx2.pmadd.ub.sw", SHORTS, weights, x)


def _add_shorts(builder: ir.IRBuilder, sums: ir.Value) -> ir.Value:
    return invoke(builder, "x86.avx2.pmadd.wd", WORDS, sums, same(SHORTS, 1))
