"""Sums over processes of one machine, through memory that they share.

Each process has a slot, in fact two that it uses by turns, and a flag for each piece of the tensor. It copies
a piece into its slot and sets the piece's flag to the number of the call; then it adds up the pieces of all
slots, in the order of the processes, as soon as their flags have that number. So the bits of a sum depend on
nothing but the summands, and one call needs one wait: with two slots a process may write again when all
others have begun the next call, and it has seen that by their flags.

Threads take the pieces as work items, all copies before all sums: a copy waits for nobody.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from fastserve_kernels.cpu.kernels.atomics import (
    ALL_SLEEPERS,
    FUTEX,
    SPINS,
    atomic_add,
    atomic_load,
    atomic_store,
    pause,
    sched_yield,
    syscall,
)
from fastserve_kernels.cpu.kernels.kernel import Elements, Integers, WorkCounter, fetch_add, kernel
from fastserve_kernels.cpu.kernels.vectors import (
    LANES,
    at,
    load_masked,
    store_masked,
)

SLOT_BYTES = 64 << 20
"""Of a slot. Memory is taken from the system when it is first written to."""
MAX_PIECES = 4096
"""Of a tensor."""
FLAG_WORDS = 8
"""Of a piece's flag: a line of the cache. The first word is the number of the last call that has written the
piece, the second how many sleep until it changes."""
ABORTED = 0
"""The word of the head that is not 0 when a process is gone: nobody waits any more, and sums are wrong."""
HEAD_WORDS = 8
SEQUENCE, DONE, SECONDS, NANOSECONDS = range(4)
"""The words of a process's own state: calls that it has finished; work items of this call that are done; how
long a sleeper sleeps before it looks whether a process is gone."""
STATE_WORDS = 8
FUTEX_WAIT, FUTEX_WAKE = 0, 1
"""Among threads of all processes that share the memory."""
LOW_WORD = 0xFFFFFFFF


@njit(error_model="numpy")
def _flag_of(head: Any, rank: Any, piece: Any) -> Any:
    return at(head, HEAD_WORDS + (rank * MAX_PIECES + piece) * FLAG_WORDS)


@njit(error_model="numpy")
def _publish(flag: Any, number: Any) -> None:
    atomic_store(flag, number)
    if FUTEX > 0 and atomic_load(at(flag, 1)) > 0:
        syscall(FUTEX, flag, FUTEX_WAKE, ALL_SLEEPERS, 0)


@njit(error_model="numpy")
def _wait(flag: Any, number: Any, head: Any, timeout: Any) -> None:
    for _ in range(SPINS):
        if atomic_load(flag) >= number:
            return
        pause()
    atomic_add(at(flag, 1), 1)
    seen = atomic_load(flag)
    while seen < number and atomic_load(at(head, ABORTED)) == 0:
        if FUTEX > 0:
            syscall(FUTEX, flag, FUTEX_WAIT, seen & LOW_WORD, timeout)
        else:
            sched_yield()
        seen = atomic_load(flag)
    atomic_add(at(flag, 1), -1)


@kernel
def all_reduce(
    counter: WorkCounter,
    x: Elements,
    out: Elements,
    slots: Elements,
    head: Integers,
    state: Integers,
    timeout: int,
    rank: int,
    ranks: int,
    size: int,
    rows: int,
    row_size: int,
    piece_rows: int,
) -> None:
    """out [rows, row_size] = the sum of x over all ranks, in float32, rounded once.

    slots [2, ranks, size]; head: `HEAD_WORDS`, then the flags [ranks, MAX_PIECES, FLAG_WORDS]; state: of this
    rank; timeout: the address of the state's seconds.
    """
    num_pieces = (rows + piece_rows - 1) // piece_rows
    item = fetch_add(counter)
    while item < 2 * num_pieces:
        number = atomic_load(at(state, SEQUENCE)) + 1
        slot = (number & 1) * ranks * size
        piece = item if item < num_pieces else item - num_pieces
        first = piece * piece_rows * row_size
        end = min(rows * row_size, first + piece_rows * row_size)
        if item < num_pieces:
            own = slot + rank * size
            for i in range(first, end, LANES):
                store_masked(slots, own + i, load_masked(x, i, end - i), end - i)
            _publish(_flag_of(head, rank, piece), number)
        else:
            for other in range(ranks):
                _wait(_flag_of(head, other, piece), number, head, timeout)
            for i in range(first, end, LANES):
                total = load_masked(slots, slot + i, end - i)
                for other in range(1, ranks):
                    total = total + load_masked(slots, slot + other * size + i, end - i)
                store_masked(out, i, total, end - i)
        if atomic_add(at(state, DONE), 1) == 2 * num_pieces - 1:
            atomic_store(at(state, DONE), 0)
            atomic_add(at(state, SEQUENCE), 1)
        item = fetch_add(counter)


@kernel
def barrier(
    counter: WorkCounter, head: Integers, state: Integers, timeout: int, rank: int, ranks: int
) -> None:
    """Returns when all ranks are in it: what each wrote to its slot before is there then."""
    if fetch_add(counter) == 0:
        number = atomic_load(at(state, SEQUENCE)) + 1
        _publish(_flag_of(head, rank, 0), number)
        for other in range(ranks):
            _wait(_flag_of(head, other, 0), number, head, timeout)
        atomic_add(at(state, SEQUENCE), 1)
