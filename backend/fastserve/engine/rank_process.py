"""The process of a rank other than the first: loads its part of the model and does what rank 0 says.

It is started by `ranks` with two file descriptors: of its socket to rank 0, and of the group's memory.
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
from fastserve.config import Config
from fastserve.openmp import limit_spinning


def main() -> None:
    """The arguments: socket, memory, replica, rank, the settings as JSON, checkpoint, tokenizer."""
    link, memory, replica, rank = map(int, sys.argv[1:5])
    config = msgspec.json.decode(sys.argv[5], type=Config)
    files = ModelFiles(Path(sys.argv[6]), Path(sys.argv[7]))
    leader = socket.socket(fileno=link)
    threading.Thread(target=_leave_with, args=(leader,), name="leader", daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C at the terminal is the leader's to handle
    limit_spinning()  # before torch is imported, and OpenMP with it
    from fastserve.engine.engine_loader import load_runner
    from fastserve.engine.ranked_model_runner import follow
    from fastserve_kernels.cpu.shared_memory_group import SharedMemoryGroup
    from fastserve_kernels.process_group import RankLostError

    group = SharedMemoryGroup(memory, rank, config.tensor_parallel_size)
    os.close(memory)
    try:
        follow(load_runner(config, files, replica, group), group)
    except (ModelError, RankLostError) as error:
        sys.exit(f"rank {rank}: {error}")


def _leave_with(leader: socket.socket) -> None:
    """Ends this process, wherever it waits, when rank 0 is gone, which never sends anything."""
    leader.recv(1)
    os._exit(0)
