"""The all-reduce of two processes on this machine's CPUs: through shared memory, and gloo's, by turns."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.reduction import DupFd
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastserve_kernels.cpu.recording import Arena, record
from fastserve_kernels.cpu.shared_memory_group import SharedMemoryGroup, make_shared_memory
from fastserve_kernels.operator_definition import CPU_IMPLEMENTATIONS

RANKS = 2
ROWS = (1, 16, 64, 512)
WIDTH = 576
CALLS, WARM_UP = 1000, 100
CALLS_OF_A_PROGRAM = 60
"""As many as a step of the default model has."""


@dataclass(frozen=True)
class Timing:
    """Microseconds of one all-reduce [rows, WIDTH] bfloat16, the median of `CALLS`."""

    rows: int
    shared_memory: float
    recorded: float
    """In a recording of `CALLS_OF_A_PROGRAM`, one after the other."""
    gloo: float


def measured(rows: Sequence[int] = ROWS) -> Iterator[Timing]:
    """Starts the second process, and measures in both, for each number of rows."""
    memory = make_shared_memory(RANKS)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        store = os.path.join(directory, "store")
        other = context.Process(target=_other_rank, args=(DupFd(memory), store, rows), daemon=True)
        other.start()
        yield from _timings(memory, store, 0, rows)
        other.join()
    os.close(memory)


def _other_rank(memory: Any, store: str, rows: Sequence[int]) -> None:
    for _ in _timings(memory.detach(), store, 1, rows):
        pass


def _timings(memory: int, store: str, rank: int, rows: Sequence[int]) -> Iterator[Timing]:
    torch.set_num_threads(1)
    ours = SharedMemoryGroup(memory, rank, RANKS)
    gloo: Any = dist.ProcessGroupGloo(dist.FileStore(store, RANKS), rank, RANKS, timedelta(seconds=60))
    with torch.inference_mode():
        for count in rows:
            x = torch.zeros(count, WIDTH, dtype=torch.bfloat16)
            recorded = _recorded(ours, x)
            yield Timing(
                count,
                _median(functools.partial(ours.all_reduce, x)),
                _median(recorded) / CALLS_OF_A_PROGRAM,
                _median(functools.partial(_gloo_all_reduce, gloo, x)),
            )


def _gloo_all_reduce(gloo: Any, x: Tensor) -> None:
    gloo.allreduce([x]).wait()


def _recorded(group: SharedMemoryGroup, x: Tensor) -> Callable[[], object]:
    def chain(rows: int) -> Tensor:
        y = x[:rows]
        for _ in range(CALLS_OF_A_PROGRAM):
            y = group.all_reduce(y)
        return y

    _, program = record(chain, len(x), CPU_IMPLEMENTATIONS, Arena())
    return program.run


def _median(function: Callable[[], object]) -> float:
    seconds = []
    for _ in range(WARM_UP + CALLS):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return 1e6 * statistics.median(seconds[WARM_UP:])


def report(timings: Sequence[Timing], as_json: bool) -> str:
    """A table, or JSON."""
    if as_json:
        return json.dumps([asdict(each) for each in timings])
    lines = [
        f"Microseconds of an all-reduce [rows, {WIDTH}] bfloat16 between {RANKS} processes, medians:",
        "",
        "| rows | shared memory | recorded | gloo |",
        "|---|---|---|---|",
    ]
    lines += [f"| {t.rows} | {t.shared_memory:.1f} | {t.recorded:.1f} | {t.gloo:.1f} |" for t in timings]
    return "\n".join(lines)
