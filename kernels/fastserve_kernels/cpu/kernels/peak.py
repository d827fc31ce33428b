"""How many products of bytes the processor makes in a second, with nothing to wait for."""

from __future__ import annotations

import time
from typing import Any

import torch
from llvmlite import ir
from numba import types

from fastserve_kernels.cpu.kernels.byte_products import LANES, WORDS, add_byte_products
from fastserve_kernels.cpu.kernels.elements import same
from fastserve_kernels.cpu.kernels.kernel import Integers, WorkCounter, fetch_add, kernel
from fastserve_kernels.cpu.kernels.vectors import intrinsic

SUMS_AT_ONCE = 12
"""That do not wait for one another: more than the latency of a product times the products of a cycle."""
ITEMS, STEPS, REPEATS = 64, 4096, 5
PRODUCTS = 4 * LANES
"""Of a vector: its bytes."""


@intrinsic
def _multiply(typing: Any, steps: Any) -> Any:
    """So many times SUMS_AT_ONCE vectors of products; gives something of their sums."""

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        before, body, after = (builder.append_basic_block(name) for name in ("peak", "body", "after"))
        builder.branch(before)
        builder.position_at_end(before)
        ones = same(WORDS, 0x01010101)
        builder.branch(body)
        builder.position_at_end(body)
        step = builder.phi(args[0].type)
        sums = [builder.phi(WORDS) for _ in range(SUMS_AT_ONCE)]
        step.add_incoming(args[0], before)
        # A product's factor is a sum: else it would be known before, and nothing left to multiply.
        added = [add_byte_products(builder, each, [each], [ones], are_small=True) for each in sums]
        for number, (each, result) in enumerate(zip(sums, added, strict=True)):
            each.add_incoming(same(WORDS, number), before)
            each.add_incoming(result, body)
        left = builder.sub(step, step.type(1))
        step.add_incoming(left, body)
        builder.cbranch(builder.icmp_signed(">", left, left.type(0)), body, after)
        builder.position_at_end(after)
        total = added[0]
        for each in added[1:]:
            total = builder.xor(total, each)
        return builder.sext(builder.extract_element(total, ir.IntType(32)(0)), args[0].type)

    return types.int64(steps), lower


@kernel
def multiply_bytes(counter: WorkCounter, results: Integers, items: int, steps: int) -> None:
    """Work items of `steps` times SUMS_AT_ONCE vectors of products; results [items]."""
    item = fetch_add(counter)
    while item < items:
        results[item] = _multiply(steps)
        item = fetch_add(counter)


def byte_products_per_second() -> float:
    """Multiplications of bytes, each with its addition, on all of torch's threads: the best of a few."""
    results = torch.zeros(ITEMS, dtype=torch.int64)
    run = multiply_bytes(torch.float32)
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        run(True, results.data_ptr(), ITEMS, STEPS)
        best = min(best, time.perf_counter() - start)
    return ITEMS * STEPS * SUMS_AT_ONCE * PRODUCTS / best
