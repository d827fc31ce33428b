"""Times of GPU work in CUDA graphs, over so many copies of the data that no call finds its own in the L2."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastserve_kernels.bench.calls import Call
from fastserve_kernels.bench.report import Ceilings
from fastserve_kernels.bench.statistics import Samples

COLD_CACHES = 2
"""How many times the L2 the copies fill together."""
MAX_COPIES = 512
"""Where a weight is smaller still, some of it is found in the L2, as in serving such a model."""
MIN_CALLS = 24
"""In a graph: the time to start it is shared among them."""


@dataclass(frozen=True)
class Graph:
    """A captured sequence of calls. Keeps what they read and write alive."""

    graph: torch.cuda.CUDAGraph
    calls: Sequence[Call]


def copies_needed(nbytes: int, device: torch.device) -> int:
    """Copies of that many bytes that together exceed the L2 cache `COLD_CACHES` times; small data has few."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(math.ceil(COLD_CACHES * cache / max(nbytes, 1)) + 1, 2), MAX_COPIES)


def copied(inputs: Sequence[Any], count: int) -> list[list[Any]]:
    """The inputs, and clones of them at other addresses."""
    return [list(inputs), *([_clone(value) for value in inputs] for _ in range(count - 1))]


def _clone(value: Any) -> Any:
    """Of a tensor, or of those in a tuple."""
    if isinstance(value, tuple):
        return tuple.__new__(type(value), map(_clone, value))
    return value.clone() if isinstance(value, Tensor) else value


def capture(calls: Sequence[Call], rounds: int | None = None) -> Graph:
    """Captures the calls in turn, several rounds of them if they are few; runs each once before."""
    rounds = rounds or math.ceil(MIN_CALLS / len(calls))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    sequence = [*calls] * rounds
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in sequence:
            call()
    return Graph(graph, sequence)


def measure(contestants: Mapping[str, Graph], repetitions: int, warmups: int = 2) -> dict[str, Samples]:
    """Seconds of one call of each contestant, who take turns within each repetition."""
    for _ in range(warmups):
        for contestant in contestants.values():
            contestant.graph.replay()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in contestants}
    for _ in range(repetitions):
        for name, contestant in contestants.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            contestant.graph.replay()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: Samples(
            tuple(start.elapsed_time(end) / 1e3 / len(contestants[name].calls) for start, end in pairs)
        )
        for name, pairs in events.items()
    }


def ceilings(device: torch.device) -> Ceilings:
    """The rates of a copy of 1 GiB, and of a product of matrices 8192 wide."""
    source = torch.randint(256, (1 << 30,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = 8192
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    product = torch.empty_like(a)
    graphs = {
        "copy": capture([lambda: target.copy_(source)]),
        "product": capture([lambda: torch.mm(a, b, out=product)]),
    }
    times = measure(graphs, repetitions=5)
    return Ceilings(2 * source.nbytes / times["copy"].median, 2 * side**3 / times["product"].median)
