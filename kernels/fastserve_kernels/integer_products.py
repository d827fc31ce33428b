"""Whether this processor multiplies bytes faster than the floats that codes stand for: measured.

Where there are no kernels for these, the floats are those of a dense weight.
"""

from __future__ import annotations

import functools
import logging
import time

import torch

from fastserve_kernels import ops
from fastserve_kernels.cpu.kernels import cpu_features
from fastserve_kernels.cpu.kernels.cpu_features import FLOAT_PRODUCTS, INTEGER_PRODUCTS
from fastserve_kernels.formats import Dense, Int4
from fastserve_kernels.preparation import prepare

logger = logging.getLogger(__name__)

ROWS, COLUMNS, TOKENS, GROUP = 1024, 1024, 16, 32
"""Of the weight that is tried, in some milliseconds."""
TRIES = 7
WORTHWHILE = 1.1
"""Times as fast, at least: the activations' rounding is no gain in itself."""


@functools.cache
def integer_products_pay(dtype: torch.dtype) -> bool:
    """Whether weights of 4 and 8 bits are to meet activations of 8 bits rather than of `dtype`.

    The best of a few tries of each kernel counts, taken by turns, so that what else runs disturbs both alike.
    """
    if not cpu_features.has(*INTEGER_PRODUCTS):
        return False
    weight = Int4.pack(torch.linspace(-1, 1, ROWS * COLUMNS).view(ROWS, COLUMNS), GROUP, symmetric=False)
    x = torch.ones(TOKENS, COLUMNS, dtype=dtype)
    has_float_kernels = cpu_features.has(*FLOAT_PRODUCTS)
    other = weight if has_float_kernels else Dense(weight.dequantize())
    candidates = [
        prepare(other, "cpu", dtype),
        prepare(weight, "cpu", dtype, quantize_activations=True),
    ]
    best = [float("inf")] * len(candidates)
    for _ in range(TRIES):
        for number, candidate in enumerate(candidates):
            start = time.perf_counter()
            ops.linear(x, candidate)
            best[number] = min(best[number], time.perf_counter() - start)
    # A dense weight takes many times the memory: where it is the other choice, it has to be the faster one.
    pay = best[0] >= (WORTHWHILE if has_float_kernels else 1 / WORTHWHILE) * best[1]
    logger.info("products of bytes take %.2f of the time of %s: %s", best[1] / best[0], dtype, pay)
    return pay
