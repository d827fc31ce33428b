"""Ranks that are threads of one process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from fastserve_kernels.cpu.shared_memory_group import SharedMemoryGroup, make_shared_memory
from fastserve_kernels.process_group import ProcessGroup
from fastserve_kernels.torch_process_group import GlooProcessGroup

Result = TypeVar("Result")


def shared_memory(world_size: int) -> list[ProcessGroup]:
    """The group of each rank, over memory."""
    descriptor = make_shared_memory(world_size)
    groups: list[ProcessGroup] = [
        SharedMemoryGroup(descriptor, rank, world_size) for rank in range(world_size)
    ]
    os.close(descriptor)
    return groups


def gloo(world_size: int) -> list[ProcessGroup]:
    """The group of each rank, over gloo."""
    store = dist.HashStore()
    ranks = list(range(world_size))
    return on_each(ranks, lambda rank: GlooProcessGroup(store, rank, world_size, timedelta(seconds=60)))


def on_each(ranks: list[Any], function: Callable[[Any], Result]) -> list[Result]:
    """What the function gives for each of the ranks, called in threads. Raises what one of them raised."""
    results: list[Any] = [None] * len(ranks)

    def call(number: int) -> None:
        try:
            results[number] = function(ranks[number])
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results
