"""Products of weights with the words of up to MAX_TOKENS tokens: the innermost loops of the linears.

All sums of a loop stay in registers: MAX_TOKENS times PANEL_VECTORS vectors, with two of weights, a word and
a table 32 at most. What is added up for a token, and in which order, does not depend on how many tokens there
are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types

from fastserve_kernels.cpu.kernels.elements import I32, I64, same
from fastserve_kernels.cpu.kernels.vectors import intrinsic
from fastserve_kernels.cpu.kernels.vnni import (
    PANEL_VECTORS,
    SUMS,
    WORDS,
    Unpack,
    Word,
    address_of,
    broadcast,
    invoke,
    load,
    multiply_words,
    nibbles,
    prefetch,
    store,
    unpacker,
)

MAX_TOKENS = 8
"""Tokens that are multiplied together."""
COLUMNS_OF_NIBBLES = nibbles.columns

Sums = list[list[list[ir.Value]]]
"""By block, vector and token."""


def width_of(tokens: int) -> int:
    """The words that lie side by side for so many tokens: the next power of two."""
    width = 1
    while width < tokens:
        width *= 2
    return width


def span_of(tokens: int, columns: int) -> int:
    """How many blocks `multiply` takes at once, of weights that have so many columns in a word. A sum waits
    for the one before it: for few tokens those of one block would not keep up with the memory."""
    if tokens <= 2 and columns == COLUMNS_OF_NIBBLES:
        return 4
    return 2 if tokens <= 4 else 1


width_for: Any = njit(width_of)
"""`width_of` in a kernel."""
span_for: Any = njit(span_of)
"""`span_of` in a kernel."""


def for_each_count(builder: ir.IRBuilder, tokens: ir.Value, body: Callable[[int], None]) -> None:
    """The body for the number of tokens there are, from 1 to MAX_TOKENS."""
    after = builder.append_basic_block("multiplied")
    cases = [builder.append_basic_block(f"tokens{t}") for t in range(1, MAX_TOKENS + 1)]
    switch = builder.switch(tokens, cases[-1])
    for t, case in enumerate(cases, 1):
        if t < MAX_TOKENS:
            switch.add_case(I64(t), case)
        builder.position_at_end(case)
        body(t)
        builder.branch(after)
    builder.position_at_end(after)


def _add_products(
    builder: ir.IRBuilder,
    unpack: Unpack,
    word: Word,
    weights: ir.Value,
    x: ir.Value,
    count: ir.Value,
    first: Sums,
) -> Sums:
    """first + the products of `count` vectors of each block of a panel with the words of each token."""
    tokens = len(first[0][0])
    width = width_of(tokens)
    before = builder.block
    loop, after = builder.append_basic_block("words"), builder.append_basic_block("summed")
    builder.branch(loop)
    builder.position_at_end(loop)
    i = builder.phi(I64)
    sums = [[[builder.phi(total.type) for total in vector] for vector in of_block] for of_block in first]
    totals = [[list(vector) for vector in of_block] for of_block in sums]
    for s in range(len(first)):
        position = builder.add(i, builder.mul(count, I64(s)))
        found = []
        for p in range(PANEL_VECTORS):
            index = builder.add(builder.mul(position, I64(PANEL_VECTORS)), I64(p))
            # In the order in which they lie, which memory likes better than that of the loads.
            ordinal = builder.add(builder.mul(i, I64(len(first) * PANEL_VECTORS)), I64(s * PANEL_VECTORS + p))
            prefetch(builder, address_of(builder, weights, ordinal, WORDS))
            found.append(unpack(load(builder, weights, index)))
        of_x = address_of(builder, x, builder.mul(position, I64(len(found[0]) * width)), I32)
        for j in range(len(found[0])):
            for t in range(tokens):
                words = broadcast(builder, builder.load(builder.gep(of_x, [I64(j * width + t)])))
                for p in range(PANEL_VECTORS):
                    totals[s][p][t] = multiply_words(builder, word, totals[s][p][t], found[p][j], words)
    following = builder.add(i, I64(1))
    builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
    i.add_incoming(I64(0), before)
    i.add_incoming(following, loop)
    for s, of_block in enumerate(sums):
        for p, vector in enumerate(of_block):
            for t, total in enumerate(vector):
                total.add_incoming(first[s][p][t], before)
                total.add_incoming(totals[s][p][t], loop)
    builder.position_at_end(after)
    return totals


@intrinsic
def multiply(
    typing: Any,
    stored: Any,
    table: Any,
    x: Any,
    tokens: Any,
    blocks: Any,
    count: Any,
    totals: Any,
    scales: Any,
    step: Any,
) -> Any:
    """totals[token, row] += scales[row] * sum of weights * x, block by block.

    A block is `count` pairs of vectors, whose sum begins at 0; it has scales [PANEL_VECTORS * VECTOR_ROWS]
    float32, those of the next block `step` further on. The blocks lie one after another, and there are 1 or
    span_for(tokens, columns). (A loop over all blocks here is slower: LLVM keeps totals for all of it, and
    spills.)"""

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        weights, table_, words, token_count, blocks_, count_, totals_, scales_, step_ = args

        def add(sums: Sums) -> None:
            _add_scaled(builder, sums, totals_, scales_, step_)

        nothing = same(SUMS, 0.0)
        operands = (weights, table_, words, token_count, blocks_, count_)
        _multiply_blocks(builder, stored.dtype, x.dtype, operands, nothing, add)
        return context.get_dummy_value()

    integer, floats = types.int64, types.CPointer(types.float32)
    return types.void(stored, table, x, integer, integer, integer, totals, floats, integer), lower


def _multiply_blocks(
    builder: ir.IRBuilder,
    stored: Word,
    word: Word,
    operands: tuple[ir.Value, ...],
    nothing: ir.Value,
    add: Callable[[Sums], None],
) -> None:
    """Has the sums of one block, or of a span, added. `operands`: weights, table, words; the numbers of
    tokens, of blocks, and of words of a block. `nothing`: what a sum begins with."""
    weights, table, words, token_count, blocks_, count = operands

    def body(tokens: int) -> None:
        unpack = unpacker(builder, stored, word, table)

        def multiply_span(blocks: int) -> None:
            first = [[[nothing] * tokens] * PANEL_VECTORS for _ in range(blocks)]
            add(_add_products(builder, unpack, word, weights, words, count, first))

        _for_each_span(builder, span_of(tokens, stored.columns), blocks_, multiply_span)

    for_each_count(builder, token_count, body)


def _for_each_span(builder: ir.IRBuilder, span: int, blocks: ir.Value, body: Callable[[int], None]) -> None:
    """The body for one block, or for `span` of them."""
    if span == 1:
        body(1)
        return
    with builder.if_else(builder.icmp_signed("==", blocks, I64(1))) as (one, several):
        with one:
            body(1)
        with several:
            body(span)


def _add_scaled(
    builder: ir.IRBuilder,
    sums: Sums,
    totals: ir.Value,
    scales: ir.Value,
    step: ir.Value,
    x_scales: ir.Value | None = None,
) -> None:
    """Adds the sums of the blocks to the totals; those of integers are multiplied by `x_scales` too."""
    factors = []
    for s in range(len(sums)):
        of_block = builder.gep(scales, [builder.mul(step, I64(s))])
        factors.append([load(builder, of_block, I64(p), SUMS) for p in range(PANEL_VECTORS)])
    for t in range(len(sums[0][0])):
        for p in range(PANEL_VECTORS):
            place = I64(t * PANEL_VECTORS + p)
            total = load(builder, totals, place, SUMS)
            for s, of_vectors in enumerate(sums):
                found = of_vectors[p][t]
                if x_scales is not None:
                    of_token = builder.load(builder.gep(x_scales, [I64(s * MAX_TOKENS + t)]))
                    found = builder.fmul(builder.sitofp(found, SUMS), broadcast(builder, of_token))
                total = invoke(builder, "fma.v16f32", SUMS, factors[s][p], found, total)
            store(builder, total, totals, place)


@intrinsic
def multiply_grouped_integers(
    typing: Any,
    stored: Any,
    x: Any,
    tokens: Any,
    blocks: Any,
    count: Any,
    totals: Any,
    scales: Any,
    step: Any,
    x_scales: Any,
) -> Any:
    """`multiply` of bytes: totals[token, row] += scales[row] * x_scales[token] * sum of weights * x.

    The sums of a block are int32, and exact. x_scales [blocks, MAX_TOKENS] float32."""

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        weights, words, token_count, blocks_, count_, totals_, scales_, step_, x_scales_ = args

        def add(sums: Sums) -> None:
            _add_scaled(builder, sums, totals_, scales_, step_, x_scales_)

        nothing = ir.Constant(WORDS, None)
        operands = (weights, weights, words, token_count, blocks_, count_)  # no table is looked up in
        _multiply_blocks(builder, stored.dtype, x.dtype, operands, nothing, add)
        return context.get_dummy_value()

    integer, floats = types.int64, types.CPointer(types.float32)
    return types.void(stored, x, integer, integer, integer, totals, floats, integer, floats), lower


@intrinsic
def multiply_integers(typing: Any, weights: Any, x: Any, tokens: Any, count: Any, totals: Any) -> Any:
    """totals[token, row] += sum of weights * x over `count` pairs of vectors; totals are int32."""

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        weights_, x_words, token_count, count_, totals_ = args

        def body(tokens_: int) -> None:
            first = [
                [load(builder, totals_, I64(t * PANEL_VECTORS + p)) for t in range(tokens_)]
                for p in range(PANEL_VECTORS)
            ]
            sums = _add_products(
                builder, lambda vector: [vector], x.dtype, weights_, x_words, count_, [first]
            )
            for p, vector in enumerate(sums[0]):
                for t, total in enumerate(vector):
                    store(builder, total, totals_, I64(t * PANEL_VECTORS + p))

        for_each_count(builder, token_count, body)
        return context.get_dummy_value()

    return types.void(weights, x, types.int64, types.int64, totals), lower


@intrinsic
def multiply_groups(typing: Any, factors: Any, sums: Any, tokens: Any, groups: Any, totals: Any) -> Any:
    """totals[token, row] = sum over the groups of factors[group, row] * sums[group, token].

    factors have PANEL_VECTORS * VECTOR_ROWS rows, sums MAX_TOKENS tokens. All tokens are taken together, for
    each sum waits for the one before it: one at a time they take 15 % of a prompt in groups of 32."""

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        factors_, sums_, token_count, groups_, totals_ = args

        def body(tokens_: int) -> None:
            before = builder.block
            loop, after = builder.append_basic_block("groups"), builder.append_basic_block("corrected")
            builder.branch(loop)
            builder.position_at_end(loop)
            g = builder.phi(I64)
            found = [[builder.phi(SUMS) for _ in range(tokens_)] for _ in range(PANEL_VECTORS)]
            places = [builder.add(builder.mul(g, I64(PANEL_VECTORS)), I64(p)) for p in range(PANEL_VECTORS)]
            of_rows = [load(builder, factors_, place, SUMS) for place in places]
            of_tokens = builder.gep(sums_, [builder.mul(g, I64(MAX_TOKENS))])
            following = builder.add(g, I64(1))
            for t in range(tokens_):
                of_token = broadcast(builder, builder.load(builder.gep(of_tokens, [I64(t)])))
                for p in range(PANEL_VECTORS):
                    total = invoke(builder, "fma.v16f32", SUMS, of_rows[p], of_token, found[p][t])
                    found[p][t].add_incoming(same(SUMS, 0.0), before)
                    found[p][t].add_incoming(total, loop)
                    found[p][t] = total
            g.add_incoming(I64(0), before)
            g.add_incoming(following, loop)
            builder.cbranch(builder.icmp_signed("<", following, groups_), loop, after)
            builder.position_at_end(after)
            for p in range(PANEL_VECTORS):
                for t in range(tokens_):
                    store(builder, found[p][t], totals_, I64(t * PANEL_VECTORS + p))

        for_each_count(builder, token_count, body)
        return context.get_dummy_value()

    return types.void(factors, sums, types.int64, types.int64, totals), lower
