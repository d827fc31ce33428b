"""Where the operators are implemented, and their import at the first call: numba and Triton's compiler take
longer to import than all the rest."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

CPU_MODULES = {
    "linear": "cpu.linear_preparation",
    "linear_int4": "cpu.linear_preparation",
    "linear_int8": "cpu.linear_preparation",
    "linear_int_rows": "cpu.linear_preparation",
    "linear_nf4": "cpu.linear_preparation",
    "linear_fp8": "cpu.linear_preparation",
    "linear_w8a8": "cpu.linear_preparation",
    "linear_block_sparse": "cpu.linear_preparation",
    "linear_low_rank": "cpu.linear_preparation",
    "rms_norm": "cpu.operators",
    "add_rms_norm": "cpu.operators",
    "swiglu": "cpu.operators",
    "write_kv": "cpu.operators",
    "rotary_write_kv": "cpu.operators",
    "paged_attention": "cpu.operators",
    "sample": "cpu.sampling",
    "log_probs": "cpu.sampling",
}
"""The module of this package that has a CPU's implementation, under the operator's name; an operator that is
not here has `reference` (`prepare` never picks one of these for a CPU)."""

GPU_MODULES = {
    "linear_int4": "int4_linear",
    "linear_int8": "int8_linear",
    "linear_int_rows": "int_rows_linear",
    "linear_nf4": "int4_linear",
    "linear_fp8": "int8_linear",
    "linear_w8a8": "w8a8",
    "linear_sparse24": "sparse24",
    "linear_sparse24_int4": "sparse24",
    "linear_block_sparse": "block_sparse",
    "linear_bitmap": "bitmap",
    "linear_low_rank": "low_rank",
    "rms_norm": "norms",
    "add_rms_norm": "norms",
    "swiglu": "swiglu",
    "rotary": "kv_write",
    "write_kv": "kv_write",
    "rotary_write_kv": "kv_write",
    "paged_attention": "attention",
    "sample": "sampling",
    "log_probs": "sampling",
}
"""The module of `gpu` that has its Triton kernels; an operator that is not here has torch's own."""


def cpu_module(operator: str) -> ModuleType:
    """Imports it."""
    return importlib.import_module(f"fastserve_kernels.{CPU_MODULES[operator]}")


def gpu_module(operator: str) -> ModuleType:
    """Imports it. Raises ImportError if the package triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        raise ImportError(
            f"{operator} on a GPU needs the package triton, 3.6 or newer, which is not installed; torch's "
            "CUDA wheels bring it along"
        )
    return importlib.import_module(f"fastserve_kernels.gpu.{GPU_MODULES[operator]}")


def imported_at_first_call(operator: str, module: Callable[[str], ModuleType]) -> Callable[..., Any]:
    """The implementation of the operator in the module that `module` imports."""
    implementation: Callable[..., Any] | None = None

    def call(*arguments: Any) -> Any:
        nonlocal implementation
        if implementation is None:
            implementation = getattr(module(operator), operator)
        return implementation(*arguments)

    return call
