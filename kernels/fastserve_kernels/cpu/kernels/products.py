"""Products of weights with the words of up to MAX_TOKENS tokens: the innermost loops of the linears.

All sums of a loop stay in registers: MAX_TOKENS times PANEL_VECTORS vectors, with two of weights, a word and
a table 32 at most; those of one vector and of half as many tokens in the 16 registers of AVX2, of which a
vector takes two. What is added up for a token, and in which order, does not depend on how many tokens there
are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import njit, types

from fastserve_kernels.cpu.kernels.elements import I32, I64, invoke, same
from fastserve_kernels.cpu.kernels.masks import HAS_AVX512
from fastserve_kernels.cpu.kernels.vectors import intrinsic
from fastserve_kernels.cpu.kernels.vnni import (
    PANEL_VECTORS,
    SUMS,
    WORDS,
    Unpack,
    Word,
    address_of,
    broadcast,
    load,
    multiply_words,
    nibbles,
    prefetch,
    store,
    unpacker,
    words_together,
)

MAX_TOKENS = 8
"""Tokens that are multiplied together."""
COLUMNS_OF_NIBBLES = nibbles.columns
REGISTERS_OF_A_VECTOR = 1 if HAS_AVX512 else 2
TILE_VECTORS, TILE_TOKENS = (PANEL_VECTORS, MAX_TOKENS) if HAS_AVX512 else (1, 4)
"""The vectors of a panel, and the tokens, whose sums fit the registers."""

Sums = list[list[list[ir.Value]]]
"""By block, vector and token."""


class Tile(NamedTuple):
    """The vectors of a panel and the tokens whose sums are in registers together."""

    vectors: range
    tokens: range
    width: int
    """Words of all tokens that lie side by side."""


def width_of(tokens: int) -> int:
    """The words that lie side by side for so many tokens: the next power of two."""
    width = 1
    while width < tokens:
        width *= 2
    return width


def span_of(tokens: int, columns: int) -> int:
    """How many blocks `multiply` takes at once, of weights that have so many columns in a word. A sum waits
    for the one before it: for few tokens those of one block would not keep up with the memory."""
    vectors = tokens * REGISTERS_OF_A_VECTOR
    if vectors <= 2 and columns == COLUMNS_OF_NIBBLES:
        return 4
    return 2 if vectors <= 4 else 1


class Product(NamedTuple):
    """What meets what: weights as they are stored, which are unpacked to words like those of x."""

    stored: Word
    word: Word
    unpack: Unpack


def tiles_of(tokens: int) -> list[Tile]:
    """What so many tokens are multiplied in by all vectors of a panel."""
    return [
        Tile(range(p, p + TILE_VECTORS), range(t, min(t + TILE_TOKENS, tokens)), width_of(tokens))
        for p in range(0, PANEL_VECTORS, TILE_VECTORS)
        for t in range(0, tokens, TILE_TOKENS)
    ]


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
    product: Product,
    tile: Tile,
    weights: ir.Value,
    x: ir.Value,
    count: ir.Value,
    first: Sums,
) -> Sums:
    """first + the products of `count` vectors of each block of a panel with the words of each token, of those
    that are in the tile."""
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
        for p in tile.vectors:
            index = builder.add(builder.mul(position, I64(PANEL_VECTORS)), I64(p))
            if tile.tokens.start == 0:
                # In the order in which they lie, which memory likes better than that of the loads.
                line = builder.add(
                    builder.mul(i, I64(len(first) * PANEL_VECTORS)), I64(s * PANEL_VECTORS + p)
                )
                prefetch(builder, address_of(builder, weights, line, WORDS))
            found.append(product.unpack(load(builder, weights, index)))
        words = len(found[0])
        of_x = address_of(builder, x, builder.mul(position, I64(words * tile.width)), I32)
        step = words_together(product.stored, product.word)
        for j in range(0, words, step):
            together = range(j, j + step)
            for t, token in enumerate(tile.tokens):
                places = [builder.gep(of_x, [I64(k * tile.width + token)]) for k in together]
                of_token = [broadcast(builder, builder.load(place)) for place in places]
                for p, of_vector in enumerate(found):
                    of_weights = [of_vector[k] for k in together]
                    totals[s][p][t] = multiply_words(
                        builder, product.stored, product.word, totals[s][p][t], of_weights, of_token
                    )
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

        def add(tile: Tile, sums: Sums) -> None:
            _add_scaled(builder, tile, sums, totals_, scales_, step_)

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
    add: Callable[[Tile, Sums], None],
) -> None:
    """Has the sums of one block, or of a span, added. `operands`: weights, table, words; the numbers of
    tokens, of blocks, and of words of a block. `nothing`: what a sum begins with."""
    weights, table, words, token_count, blocks_, count = operands

    def body(tokens: int) -> None:
        product = Product(stored, word, unpacker(builder, stored, word, table))

        def multiply_span(blocks: int) -> None:
            for tile in tiles_of(tokens):
                first = [[[nothing] * len(tile.tokens)] * len(tile.vectors)] * blocks
                add(tile, _add_products(builder, product, tile, weights, words, count, first))

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
    tile: Tile,
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
        factors.append([load(builder, of_block, I64(p), SUMS) for p in tile.vectors])
    for t, token in enumerate(tile.tokens):
        for p, vector in enumerate(tile.vectors):
            place = I64(token * PANEL_VECTORS + vector)
            total = load(builder, totals, place, SUMS)
            for s, of_vectors in enumerate(sums):
                found = of_vectors[p][t]
                if x_scales is not None:
                    of_token = builder.load(builder.gep(x_scales, [I64(s * MAX_TOKENS + token)]))
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

        def add(tile: Tile, sums: Sums) -> None:
            _add_scaled(builder, tile, sums, totals_, scales_, step_, x_scales_)

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
            product = Product(weights.dtype, x.dtype, lambda vector: [vector])
            for tile in tiles_of(tokens_):
                places = [[I64(t * PANEL_VECTORS + p) for t in tile.tokens] for p in tile.vectors]
                first = [[load(builder, totals_, place) for place in vector] for vector in places]
                sums = _add_products(builder, product, tile, weights_, x_words, count_, [first])
                for of_vector, found in zip(places, sums[0], strict=True):
                    for place, total in zip(of_vector, found, strict=True):
                        store(builder, total, totals_, place)

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
            for tile in tiles_of(tokens_):
                _multiply_groups(builder, tile, factors_, sums_, groups_, totals_)

        for_each_count(builder, token_count, body)
        return context.get_dummy_value()

    return types.void(factors, sums, types.int64, types.int64, totals), lower


def _multiply_groups(
    builder: ir.IRBuilder, tile: Tile, factors: ir.Value, sums: ir.Value, groups: ir.Value, totals: ir.Value
) -> None:
    before = builder.block
    loop, after = builder.append_basic_block("groups"), builder.append_basic_block("corrected")
    builder.branch(loop)
    builder.position_at_end(loop)
    g = builder.phi(I64)
    found = [[builder.phi(SUMS) for _ in tile.tokens] for _ in tile.vectors]
    places = [builder.add(builder.mul(g, I64(PANEL_VECTORS)), I64(p)) for p in tile.vectors]
    of_rows = [load(builder, factors, place, SUMS) for place in places]
    of_tokens = builder.gep(sums, [builder.mul(g, I64(MAX_TOKENS))])
    following = builder.add(g, I64(1))
    for t, token in enumerate(tile.tokens):
        of_token = broadcast(builder, builder.load(builder.gep(of_tokens, [I64(token)])))
        for p, of_row in enumerate(of_rows):
            total = invoke(builder, "fma.v16f32", SUMS, of_row, of_token, found[p][t])
            found[p][t].add_incoming(same(SUMS, 0.0), before)
            found[p][t].add_incoming(total, loop)
            found[p][t] = total
    g.add_incoming(I64(0), before)
    g.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, groups), loop, after)
    builder.position_at_end(after)
    for p, vector in enumerate(tile.vectors):
        for t, token in enumerate(tile.tokens):
            store(builder, found[p][t], totals, I64(token * PANEL_VECTORS + vector))
