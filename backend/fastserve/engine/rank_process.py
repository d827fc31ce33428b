"""The process of a rank other than the first: loads its part of the model and does what it is told.

It is started by `ranks`, with file descriptors: of its socket to rank 0, of the memory of its stage's group,
and, where it leads a stage, of the links to the stages before and behind.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from pathlib import Path

import msgspec

from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.model_files import ModelFiles
from fastserve.engine.rank_layout import RankLayout, RankStart
from fastserve.openmp import limit_spinning


def main() -> None:
    """The argument: `RankStart` as JSON."""
    start = msgspec.json.decode(sys.argv[1], type=RankStart)
    leader = socket.socket(fileno=start.leader)
    threading.Thread(target=_leave_with, args=(leader,), name="leader", daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C at the terminal is the leader's to handle
    limit_spinning()  # before torch is imported, and OpenMP with it
    from fastserve_kernels.process_group import RankLostError

    try:
        _run(start)
    except (ModelError, RankLostError) as error:
        sys.exit(f"rank {start.rank}: {error}")


def _run(start: RankStart) -> None:
    from fastserve.engine.engine_loader import load_runner
    from fastserve.engine.pipelined_model_runner import lead_stage
    from fastserve.engine.ranked_model_runner import follow
    from fastserve.engine.stage_link import StageLink
    from fastserve_kernels.cpu.shared_memory_group import SharedMemoryGroup

    layout = RankLayout.of(start.config)
    stage, number = layout.stage_of(start.rank), layout.number_in_stage(start.rank)

    def link(descriptors: tuple[int, int]) -> StageLink:
        memory, end = descriptors
        opened = StageLink(memory, socket.socket(fileno=end), layout.num_slots)
        os.close(memory)
        return opened

    group = None
    if start.memory is not None:
        group = SharedMemoryGroup(start.memory, number, layout.tensor_parallel_size)
        os.close(start.memory)
    files = ModelFiles(Path(start.checkpoint), Path(start.tokenizer))
    previous = None if start.previous is None else link(start.previous)
    following = None if start.following is None else link(start.following)
    runner = load_runner(start.config, files, start.replica, group, stage)
    if previous is not None and following is not None:
        lead_stage(runner, group, previous, following, stage == layout.pipeline_parallel_size - 1)
    elif group is not None:
        follow(runner, group, stage == 0)


def _leave_with(leader: socket.socket) -> None:
    """Ends this process, wherever it waits, when rank 0 is gone, which never sends anything."""
    leader.recv(1)
    os._exit(0)
