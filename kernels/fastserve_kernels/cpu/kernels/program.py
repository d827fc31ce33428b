"""A list of kernel calls that a team of threads runs from end to end, with no Python in between.

Every thread of the team goes through all calls in order. A kernel hands out work items until none is left, so
a thread that comes late finds none and goes on; whoever leaves a call last says that it is done. Between
calls nobody waits for a thread that another program keeps from running, unless that holds a work item; at the
end the team waits for all of its threads.

A thread that waits looks again and again for some microseconds, then sleeps: beside a busy neighbour the one
that is waited for may need its core.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from types import FunctionType
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types

from fastserve_kernels.cpu.kernels.atomics import (
    ALL_SLEEPERS,
    FUTEX,
    SPINS,
    atomic_add,
    atomic_load,
    pause,
    sched_yield,
    syscall,
)
from fastserve_kernels.cpu.kernels.elements import I64
from fastserve_kernels.cpu.kernels.kernel import KERNEL_NAMES, compile_entry, run_in_parallel
from fastserve_kernels.cpu.kernels.vectors import at, intrinsic

CALL_WORDS = 8
"""Of a call: a line of the cache, which threads write to."""
FUNCTION, ARGUMENTS, ACTIVE, DONE, SLEEPERS = range(5)
"""The words of a call: the addresses of the kernel and of its arguments, whose first word is the counter of
its work items; threads that are in it; whether all its work items are done; threads that sleep until then."""

FUTEX_WAIT, FUTEX_WAKE = 128, 129
"""Among threads of one process."""


@intrinsic
def _invoke(typing: Any, function: Any, arguments: Any) -> Any:
    """Calls the kernel at an address with the arguments at another."""

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        kind = ir.FunctionType(ir.VoidType(), [I64.as_pointer()])
        builder.call(
            builder.inttoptr(args[0], kind.as_pointer()), [builder.inttoptr(args[1], I64.as_pointer())]
        )
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), lower


@njit(error_model="numpy")
def _wait(call: Any) -> None:
    done = at(call, DONE)
    for _ in range(SPINS):
        if atomic_load(done) != 0:
            return
        pause()
    atomic_add(at(call, SLEEPERS), 1)
    while atomic_load(done) == 0:
        if FUTEX > 0:
            syscall(FUTEX, done, FUTEX_WAIT, 0, 0)
        else:
            sched_yield()


@njit(error_model="numpy")
def _finish(call: Any) -> None:
    atomic_add(at(call, DONE), 1)
    if FUTEX > 0 and atomic_load(at(call, SLEEPERS)) > 0:
        syscall(FUTEX, at(call, DONE), FUTEX_WAKE, ALL_SLEEPERS, 0)


@intrinsic
def _clear(typing: Any, address: Any) -> Any:
    """Sets the word at an address to 0."""

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        builder.store(I64(0), builder.inttoptr(args[0], I64.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64), lower


def _run(program: Any) -> None:
    """What each thread does. `program`: the number of calls; a line further on, the words of each."""
    for i in range(program[0]):
        call = at(program, (i + 1) * CALL_WORDS)
        if atomic_load(at(call, DONE)) == 0:
            atomic_add(at(call, ACTIVE), 1)
            _invoke(call[FUNCTION], call[ARGUMENTS])
            if atomic_add(at(call, ACTIVE), -1) == 1:
                _finish(call)
            else:
                _wait(call)


def _reset(program: Any) -> None:
    """Has all calls begin anew; no thread may be in the program."""
    for i in range(program[0]):
        call = at(program, (i + 1) * CALL_WORDS)
        call[ACTIVE] = 0
        call[DONE] = 0
        call[SLEEPERS] = 0
        _clear(call[ARGUMENTS])


@functools.cache
def _compiled(function: FunctionType) -> Any:
    entry = FunctionType(function.__code__, function.__globals__)
    entry.__module__ = __name__
    compiled = compile_entry(entry, function.__name__)
    return compiled, ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)


def _lines(num_words: int) -> np.ndarray:
    """Words that begin where a line of the cache does."""
    words = np.zeros(num_words + CALL_WORDS, dtype=np.int64)
    first = -words.ctypes.data // words.itemsize % CALL_WORDS
    return words[first : first + num_words]


Call = tuple[int, Sequence[int]]
"""The address of a kernel, and the words of its arguments (see `kernel.record_call`)."""


class Program:
    """Kernel calls in the order in which they run."""

    def __init__(
        self, calls: Sequence[Call], memory: object, row_words: Sequence[tuple[int, int]] = ()
    ) -> None:
        """`memory`: what keeps the memory that the arguments point to. `row_words`: the call and the word of
        each argument that is the number of rows (`resize`)."""
        self._memory = memory
        sizes = [-(-len(arguments) // CALL_WORDS) for _, arguments in calls]
        self._ends = np.cumsum([1 + len(calls), *sizes]) * CALL_WORDS
        """Where the arguments of each call begin, and the last ones end."""
        self._words = _lines(int(self._ends[-1]))
        self._address = self._words.ctypes.data
        self._words[0] = len(calls)
        for number, (address, arguments) in enumerate(calls):
            start, call = self._ends[number], (number + 1) * CALL_WORDS
            self._words[start : start + len(arguments)] = arguments
            self._words[call + FUNCTION] = address
            self._words[call + ARGUMENTS] = self._address + int(start) * self._words.itemsize
        self._row_words = np.array([self._ends[call] + word for call, word in row_words], dtype=np.int64)
        self._run, self._reset = _compiled(_run)[1], _compiled(_reset)[1]

    def resize(self, rows: int) -> None:
        """Has it compute so many rows, up to those that it was recorded for."""
        self._words[self._row_words] = rows

    def by_kernel(self) -> dict[str, Program]:
        """The calls of each kernel alone, by its name, of as many rows as now."""
        calls: dict[str, list[Call]] = {}
        for number in range(len(self._ends) - 1):
            address = int(self._words[(number + 1) * CALL_WORDS + FUNCTION])
            arguments = self._words[self._ends[number] : self._ends[number + 1]].tolist()
            calls.setdefault(KERNEL_NAMES[address], []).append((address, arguments))
        return {name: Program(each, self._memory) for name, each in calls.items()}

    def run(self) -> None:
        """Runs all calls, on the threads that torch's operators run on. One thread may be in it at a time."""
        self._reset(self._address)
        run_in_parallel(self._run, self._address)
