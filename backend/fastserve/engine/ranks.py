"""The processes that compute a model together with this one, and what becomes of all when one ends.

Each rank has a socket to rank 0, over which nothing is sent: it ends with the process that has the other
end. A rank whose leader is gone leaves at once. When another rank is gone, rank 0 aborts the group, so that
nobody waits for it, and whoever steps the engine gets RankLostError.

Descriptors that a rank was started with, of memory and of the links between stages, are closed here: when a
process ends, nobody holds an end of it that another waits for.
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
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from fastserve.checkpoints.model_files import ModelFiles
from fastserve.config import Config
from fastserve.engine.rank_layout import RankLayout, RankStart
from fastserve.engine.stage_link import StageLink, make_link_memory
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


class Connections(NamedTuple):
    """What rank 0 has of the others."""

    group: SharedMemoryGroup | None
    """Of the first stage; None: it is rank 0 alone."""
    following: StageLink | None
    """The link to the second stage; None as `last`: there is one stage."""
    last: StageLink | None
    """That from the last stage."""

    def abort(self) -> None:
        """Lets nobody wait any more; any thread may call it. Raises nothing."""
        for each in self:
            if each is not None:
                each.abort()


Member = tuple[subprocess.Popen, socket.socket]
"""A rank's process, and the socket that ends with it."""


class Ranks:
    """The ranks beside rank 0, which is this process."""

    def __init__(self, connections: Connections, members: list[Member]) -> None:
        self.connections = connections
        self._runner: weakref.ref[ModelRunner] | None = None
        self._is_closed = threading.Event()
        self.pids = [process.pid for process, _ in members]
        watch = threading.Thread(
            target=_watch,
            args=(members, connections, self._is_closed, weakref.ref(self)),
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

    def abort(self) -> None:
        """See `Connections`."""
        self.connections.abort()

    def close(self) -> None:
        """Ends the processes."""
        self._end()


def start_ranks(config: Config, files: ModelFiles, replica: int) -> Ranks:
    """Starts the other ranks of a replica; they load their parts while this process loads its own."""
    layout = RankLayout.of(config)
    stages, ranks_of_stage = layout.pipeline_parallel_size, layout.tensor_parallel_size
    with contextlib.ExitStack() as opened:

        def memory(descriptor: int) -> int:
            opened.callback(os.close, descriptor)
            return descriptor

        groups = [
            memory(make_shared_memory(ranks_of_stage)) if ranks_of_stage > 1 else None for _ in range(stages)
        ]
        num_links = stages if stages > 1 else 0
        memories = [memory(make_link_memory(layout.num_slots)) for _ in range(num_links)]
        pairs = [socket.socketpair() for _ in range(num_links)]
        senders, receivers = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        for end in (*senders[1:], *receivers[:-1]):
            opened.enter_context(end)
        members = []
        for rank in range(1, layout.world_size):
            stage, leads = layout.stage_of(rank), layout.number_in_stage(rank) == 0
            previous = (memories[stage - 1], receivers[stage - 1].fileno()) if leads else None
            following = (memories[stage], senders[stage].fileno()) if leads else None
            members.append(_start(config, files, replica, rank, groups[stage], previous, following))
        connections = Connections(
            None if groups[0] is None else SharedMemoryGroup(groups[0], 0, ranks_of_stage),
            StageLink(memories[0], senders[0], layout.num_slots) if num_links else None,
            StageLink(memories[-1], receivers[-1], layout.num_slots) if num_links else None,
        )
        return Ranks(connections, members)


def _start(
    config: Config,
    files: ModelFiles,
    replica: int,
    rank: int,
    memory: int | None,
    previous: tuple[int, int] | None,
    following: tuple[int, int] | None,
) -> Member:
    ours, theirs = socket.socketpair()
    with theirs:
        start = RankStart(
            rank,
            replica,
            config,
            str(files.checkpoint),
            str(files.tokenizer),
            theirs.fileno(),
            memory,
            previous,
            following,
        )
        command = [sys.executable, "-c", PROGRAM, msgspec.json.encode(start).decode()]
        passed = [theirs.fileno(), memory, *(previous or ()), *(following or ())]
        descriptors = [each for each in passed if each is not None]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=descriptors)
    return process, ours


def _watch(
    members: list[Member],
    connections: Connections,
    is_closed: threading.Event,
    ranks: weakref.ref[Ranks],
) -> None:
    """Waits for the first socket that ends."""
    ended, _, _ = select.select([link for _, link in members], [], [])
    connections.abort()
    if is_closed.is_set():
        return
    rank = next(number for number, (_, link) in enumerate(members, 1) if link in ended)
    code = members[rank - 1][0].wait()
    error = RankLostError(f"rank {rank} ended (code {code})")
    logger.error("%s; what the others compute ends with it", error)
    if (owner := ranks()) is not None:
        owner.tell(error)
        owner.close()


def _close(members: list[Member], is_closed: threading.Event) -> None:
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
