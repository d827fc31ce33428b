"""Ranks on the CPUs of one machine: sums, gathers and broadcasts through memory that they share."""

from __future__ import annotations

import itertools
import mmap
import os
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastserve_kernels.cpu.kernels.all_reduce import (
    ABORTED,
    FLAG_WORDS,
    HEAD_WORDS,
    MAX_PIECES,
    NANOSECONDS,
    SEQUENCE,
    SLOT_BYTES,
    STATE_WORDS,
    all_reduce,
    barrier,
)
from fastserve_kernels.operator_definition import define
from fastserve_kernels.process_group import HEADER_WORDS, RankLostError, read_header, write_header

PIECE_ELEMENTS = 4096
"""Of a work item: with less, the flags cost more than the wait for a first piece."""
MIN_PARALLEL = 16 * 1024
"""Elements that are worth a second thread."""
WAKE_NANOSECONDS = 10_000_000
"""How long a sleeper sleeps before it looks whether a rank is gone."""
WORD = 8

_groups: weakref.WeakValueDictionary[int, SharedMemoryGroup] = weakref.WeakValueDictionary()
"""Of this process, by the number that the operator is given."""
_numbers = itertools.count()


def make_shared_memory(world_size: int) -> int:
    """A file descriptor of memory for a group. It has no name: it is gone with the last process that has it.

    Pages are taken from the system when they are first written to.
    """
    descriptor = os.memfd_create("fastserve-ranks")
    os.ftruncate(descriptor, WORD * _head_words(world_size) + 2 * world_size * SLOT_BYTES)
    return descriptor


def _head_words(world_size: int) -> int:
    return HEAD_WORDS + world_size * MAX_PIECES * FLAG_WORDS


class SharedMemoryGroup:
    """A `ProcessGroup` of processes, or threads, that map the same memory. Each rank has one thread in it."""

    def __init__(self, descriptor: int, rank: int, world_size: int) -> None:
        """`descriptor`: of `make_shared_memory`; the caller may close it."""
        self.rank = rank
        self.world_size = world_size
        memory = np.frombuffer(mmap.mmap(descriptor, 0), dtype=np.uint8)
        num_words = _head_words(world_size)
        self._head = memory[: WORD * num_words].view(np.int64)
        self._slots = torch.from_numpy(memory[WORD * num_words :]).view(2, world_size, SLOT_BYTES)
        self._state = np.zeros(STATE_WORDS, dtype=np.int64)
        self._state[NANOSECONDS] = WAKE_NANOSECONDS
        timeout = self._state.ctypes.data + WORD * (NANOSECONDS - 1)
        self._words = (self._head.ctypes.data, self._state.ctypes.data, timeout, rank, world_size)
        self._barrier = barrier(torch.float32)
        self._number = next(_numbers)
        _groups[self._number] = self

    def all_reduce(self, x: Tensor) -> Tensor:
        """See `ProcessGroup`. It can be recorded, as one kernel."""
        total: Tensor = _all_reduce(x, self._number)
        self.check()
        return total

    def sum_into(self, x: Tensor, out: Tensor) -> None:
        """Runs the kernel for contiguous x and out [T, D]."""
        rows, width = x.shape
        piece_rows = max(1, PIECE_ELEMENTS // width)
        size = SLOT_BYTES // x.itemsize
        rows_at_once = min(size // width, MAX_PIECES * piece_rows)
        if rows_at_once == 0:
            raise ValueError(f"a row of {width} elements has more than {SLOT_BYTES} bytes")
        for first in range(0, rows, rows_at_once):
            offset = first * width * x.itemsize
            all_reduce(x.dtype)(
                x.numel() >= MIN_PARALLEL,
                x.data_ptr() + offset,
                out.data_ptr() + offset,
                self._slots.data_ptr(),
                *self._words,
                size,
                min(rows - first, rows_at_once),
                width,
                piece_rows,
            )

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """See `ProcessGroup`."""
        rows_at_once = SLOT_BYTES // (max(widths) * x.itemsize)
        parts = [self._gather(part, widths) for part in x.split(rows_at_once)]
        if self.rank != 0:
            return x
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        slots = self._next_slots()
        slots[self.rank, : x.nbytes].view(x.dtype).view(x.shape).copy_(x)
        self._meet()
        if self.rank != 0:
            return x
        rows = len(x)
        sizes = [rows * width * x.itemsize for width in widths]
        parts = [slot[:size].view(x.dtype).view(rows, -1) for slot, size in zip(slots, sizes, strict=True)]
        return torch.cat(parts, dim=1)

    def broadcast(self, x: Tensor | None) -> Tensor:
        """See `ProcessGroup`. Raises ValueError for a tensor that is larger than a slot."""
        source, start = self._next_slots()[0], WORD * HEADER_WORDS
        header = source[:start].view(torch.int64)
        if x is not None:
            if x.nbytes > SLOT_BYTES - start:
                raise ValueError(f"{x.nbytes} bytes cannot be broadcast; allowed: {SLOT_BYTES - start}")
            source[start : start + x.nbytes].view(x.dtype).view(x.shape).copy_(x)
            write_header(header, x)
        self._meet()
        if x is not None:
            return x
        dtype, shape = read_header(header)
        size = shape.numel() * dtype.itemsize
        return source[start : start + size].view(dtype).view(shape).clone()

    def _next_slots(self) -> Tensor:
        """[world_size, SLOT_BYTES] uint8: those that the next call uses."""
        return self._slots[(int(self._state[SEQUENCE]) + 1) & 1]

    def _meet(self) -> None:
        self._barrier(False, *self._words)
        self.check()

    def check(self) -> None:
        """See `ProcessGroup`."""
        if self._head[ABORTED]:
            raise RankLostError("a rank of the group has ended")

    def abort(self) -> None:
        """See `ProcessGroup`."""
        self._head[ABORTED] = 1


def _sum(x: Tensor, group: int) -> Tensor:
    x = x.contiguous()
    out = x.new_empty(*x.shape)
    _groups[group].sum_into(x, out)
    return out


def all_reduce_shared(x: Tensor, group: int) -> Tensor:
    """The sum over the ranks of the group of that number: an operator, so that it can be recorded."""
    return _sum(x, group)


_all_reduce = define(all_reduce_shared, lambda x, group: x.new_empty(x.shape), _sum, gpu=False)
