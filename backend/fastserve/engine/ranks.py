"""The processes that compute a model together with this one, and what becomes of all when one ends.

Each rank has a socket to rank 0, over which nothing is sent: it ends with the process that has the other
end. A rank whose leader is gone leaves at once. When another rank is gone, rank 0 aborts the group, so that
nobody waits for it, and whoever steps the engine gets RankLostError.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import subprocess
import sys
import threading
import weakref
from typing import TYPE_CHECKING

import msgspec

from fastserve.checkpoints.model_files import ModelFiles
from fastserve.config import Config
from fastserve_kernels.cpu.shared_memory_group import SharedMemoryGroup, make_shared_memory
from fastserve_kernels.process_group import RankLostError

if TYPE_CHECKING:
    from fastserve.engine.model_runner import ModelRunner

logger = logging.getLogger(__name__)

# Not `-m`, which puts the working directory on the path: a folder `kernels` there confuses transformers.
PROGRAM = """
import sys
sys.path[:] = [path for path in sys.path if path]
from fastserve.engine.rank_process import main
main()
"""
EXIT_SECONDS = 5.0
"""For a rank whose socket is closed; then it is killed."""


class Ranks:
    """The ranks beside rank 0, which is this process."""

    def __init__(
        self, group: SharedMemoryGroup, members: list[tuple[subprocess.Popen, socket.socket]]
    ) -> None:
        self.group = group
        self._runner: weakref.ref[ModelRunner] | None = None
        self._is_closed = threading.Event()
        self.pids = [process.pid for process, _ in members]
        watch = threading.Thread(
            target=_watch,
            args=(members, group, self._is_closed, weakref.ref(self)),
            name="ranks",
            daemon=True,
        )
        watch.start()
        self._end = weakref.finalize(self, _close, members, self._is_closed)

    def watch(self, runner: ModelRunner) -> None:
        """Has `on_loss` of the runner called when a rank has ended."""
        self._runner = weakref.ref(runner)

    def tell(self, error: Exception) -> None:
        """Tells the runner, if there is one, what has ended a rank."""
        runner = None if self._runner is None else self._runner()
        if runner is not None:
            runner.on_loss(error)

    def close(self) -> None:
        """Ends the processes."""
        self._end()


def start_ranks(config: Config, files: ModelFiles, replica: int) -> Ranks:
    """Starts the other ranks of a replica; they load their parts while this process loads its own."""
    world_size = config.tensor_parallel_size
    memory = make_shared_memory(world_size)
    try:
        members = [_start(config, files, replica, rank, memory) for rank in range(1, world_size)]
        return Ranks(SharedMemoryGroup(memory, 0, world_size), members)
    finally:
        os.close(memory)


def _start(
    config: Config, files: ModelFiles, replica: int, rank: int, memory: int
) -> tuple[subprocess.Popen, socket.socket]:
    ours, theirs = socket.socketpair()
    with theirs:
        descriptors = (theirs.fileno(), memory)
        numbers = map(str, (*descriptors, replica, rank))
        settings = msgspec.json.encode(config).decode()
        command = [
            sys.executable,
            "-c",
            PROGRAM,
            *numbers,
            settings,
            str(files.checkpoint),
            str(files.tokenizer),
        ]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=descriptors)
    return process, ours


def _watch(
    members: list[tuple[subprocess.Popen, socket.socket]],
    group: SharedMemoryGroup,
    is_closed: threading.Event,
    ranks: weakref.ref[Ranks],
) -> None:
    """Waits for the first socket that ends."""
    ended, _, _ = select.select([link for _, link in members], [], [])
    group.abort()
    if is_closed.is_set():
        return
    rank = next(number for number, (_, link) in enumerate(members, 1) if link in ended)
    code = members[rank - 1][0].wait()
    error = RankLostError(f"rank {rank} ended (code {code})")
    logger.error("%s; what the others compute ends with it", error)
    if (owner := ranks()) is not None:
        owner.tell(error)
        owner.close()


def _close(members: list[tuple[subprocess.Popen, socket.socket]], is_closed: threading.Event) -> None:
    is_closed.set()
    for _, link in members:
        with contextlib.suppress(OSError):  # it has ended already
            link.shutdown(socket.SHUT_RDWR)
    for process, link in members:
        try:
            process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        link.close()
