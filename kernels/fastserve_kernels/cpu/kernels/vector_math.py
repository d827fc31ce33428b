"""Elementary functions of vectors."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from fastserve_kernels.cpu.kernels.elements import I32, call, same, vector_of
from fastserve_kernels.cpu.kernels.vectors import intrinsic


@intrinsic
def exp(typing: Any, x: Any) -> Any:
    """e^x to within 2 units in the last place; below -87 it is 0, above 88 it is e^88.

    Cody and Waite: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial for e^r, and n added to the exponent.
    """

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        kind, words = args[0].type, vector_of(I32, args[0])

        def number(value: float) -> ir.Constant:
            return same(kind, value)

        x = builder.select(builder.fcmp_ordered(">", args[0], number(88.0)), number(88.0), args[0])
        n = call(builder, "rint", builder.fmul(x, number(1.44269504088896341)))
        r = call(builder, "fmuladd", n, number(-0.693359375), x)
        r = call(builder, "fmuladd", n, number(2.12194440e-4), r)
        power = number(1 / 720)
        for divisor in (120, 24, 6, 2, 1, 1):
            power = call(builder, "fmuladd", power, r, number(1 / divisor))
        exponent = builder.shl(builder.fptosi(n, words), same(words, 23))
        scaled = builder.bitcast(builder.add(builder.bitcast(power, words), exponent), kind)
        return builder.select(builder.fcmp_ordered("<", x, number(-87.0)), number(0.0), scaled)

    return x(x), lower


@intrinsic
def square_root(typing: Any, x: Any) -> Any:
    """The square root."""

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return call(builder, "sqrt", *args)

    return x(x), lower
