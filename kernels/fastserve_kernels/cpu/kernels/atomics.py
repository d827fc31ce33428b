"""Words by which threads, and processes that share memory, tell one another something."""

from __future__ import annotations

import platform
import sys
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from fastserve_kernels.cpu.kernels.vectors import intrinsic

FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), 0) if sys.platform == "linux" else 0
"""The number of the system call by which threads sleep and wake one another; 0: they only yield."""

syscall: Any = types.ExternalFunction(
    "syscall", types.int64(types.int64, types.CPointer(types.int64), *[types.int64] * 3)
)
"""A system call of a number, a pointer and three more words."""
sched_yield: Any = types.ExternalFunction("sched_yield", types.int32())
"""Leaves the core to another thread that waits for one."""
SPINS = 2000
"""How often a thread looks before it sleeps: 0.1 ms on an EPYC 9005, whose pause is 47 ns."""
ALL_SLEEPERS = 1 << 30
"""As many as there may be, for the system call that wakes them."""


@intrinsic
def atomic_add(typing: Any, pointer: Any, number: Any) -> Any:
    """Adds to the word there; gives what it was."""

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.atomic_rmw("add", args[0], args[1], "seq_cst")

    return types.int64(pointer, types.int64), lower


@intrinsic
def atomic_load(typing: Any, pointer: Any) -> Any:
    """The word there: what was written before it was set is seen after this."""

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.load_atomic(args[0], "seq_cst", 8)

    return types.int64(pointer), lower


@intrinsic
def pause(typing: Any) -> Any:
    """Leaves the core to its other hyperthread for a moment."""

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        kind = ir.FunctionType(ir.VoidType(), [])
        if platform.machine() == "x86_64":
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), lower


@intrinsic
def atomic_store(typing: Any, pointer: Any, number: Any) -> Any:
    """Sets the word: whoever sees it sees what was written before."""

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        builder.store_atomic(args[1], args[0], "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(pointer, types.int64), lower
