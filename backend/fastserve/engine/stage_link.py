"""What one stage of a pipeline sends to the next: tensors through memory that both map.

A byte over a socket says that a message lies there, another the other way that its place is free. So whoever
waits wakes up when the process at the other end is gone.
"""

from __future__ import annotations

import mmap
import os
import socket
import time

import torch
from torch import Tensor

from fastserve_kernels.process_group import HEADER_WORDS, RankLostError, read_header, write_header

SLOT_BYTES = 64 << 20
"""Of a message. Memory is taken from the system when it is first written to."""
LOOK_SECONDS = 0.0005
"""How long whoever waits looks again and again before it sleeps: to be woken takes a share of a step."""
ALIGNMENT = 64
HEADER_BYTES = 8 * HEADER_WORDS


def make_link_memory(num_slots: int) -> int:
    """A file descriptor of memory for a link. It has no name: it is gone with the last process of it."""
    descriptor = os.memfd_create("fastserve-stages")
    os.ftruncate(descriptor, num_slots * SLOT_BYTES)
    return descriptor


class StageLink:
    """One end: that of the stage that sends, or that of the one that receives. One thread uses it."""

    def __init__(self, descriptor: int, end: socket.socket, num_slots: int) -> None:
        """`descriptor`: of `make_link_memory`; the caller may close it. `end`: of a pair of sockets."""
        memory = torch.frombuffer(mmap.mmap(descriptor, 0), dtype=torch.uint8)
        self._slots = memory.view(num_slots, SLOT_BYTES)
        self._end = end
        self._number = 0
        self._free = num_slots

    def send(self, *tensors: Tensor) -> None:
        """Sends a message; waits while all places hold one that was not received yet.

        Raises RankLostError if nobody is at the other end, and ValueError for more bytes than a place has.
        """
        slot = self._next_slot()
        if self._free == 0:
            self._wait()
            self._free += 1
        start = HEADER_BYTES
        slot[:8].view(torch.int64).fill_(len(tensors))
        for tensor in tensors:
            first = start + HEADER_BYTES
            if first + tensor.nbytes > SLOT_BYTES:
                raise ValueError(f"a step of {tensor.nbytes} bytes; allowed: {SLOT_BYTES - first}")
            write_header(slot[start:first].view(torch.int64), tensor)
            slot[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
            start = _aligned(first + tensor.nbytes)
        self._free -= 1
        self._tell()

    def receive(self) -> list[Tensor]:
        """The next message; waits for it. Raises RankLostError if nobody is at the other end."""
        self._wait()
        slot, start = self._next_slot(), HEADER_BYTES
        tensors = []
        for _ in range(int(slot[:8].view(torch.int64))):
            first = start + HEADER_BYTES
            dtype, shape = read_header(slot[start:first].view(torch.int64))
            end = first + shape.numel() * dtype.itemsize
            tensors.append(slot[first:end].view(dtype).view(shape).clone())
            start = _aligned(end)
        self._tell()
        return tensors

    def abort(self) -> None:
        """Lets nobody wait any more; any thread may call it. Raises nothing."""
        try:
            self._end.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it has ended already

    def _next_slot(self) -> Tensor:
        slot = self._slots[self._number % len(self._slots)]
        self._number += 1
        return slot

    def _tell(self) -> None:
        try:
            self._end.send(b".", socket.MSG_NOSIGNAL)
        except OSError as error:
            raise RankLostError("the process of another stage has ended") from error

    def _wait(self) -> None:
        end, is_there = time.monotonic() + LOOK_SECONDS, None
        try:
            while is_there is None:
                try:
                    is_there = self._end.recv(1, socket.MSG_DONTWAIT if time.monotonic() < end else 0)
                except BlockingIOError:
                    continue
        except OSError as error:
            raise RankLostError("the process of another stage has ended") from error
        if not is_there:
            raise RankLostError("the process of another stage has ended")


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT
