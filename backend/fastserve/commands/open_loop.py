"""The open loop of `fastserve bench`: a trace of real use or a distribution says when requests come."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fastserve.atomic_write import write_bytes
from fastserve.benchmark.closed_loop import run_load
from fastserve.benchmark.job import random_jobs
from fastserve.benchmark.open_loop import replay
from fastserve.benchmark.targets import Target
from fastserve.commands.workload_options import ARRIVAL_OPTIONS, add_arrival_arguments, described
from fastserve.workload.arrival import Arrival
from fastserve.workload.replay_figures import LATE_SECONDS, ClassFigures, ReplayFigures, replay_figures
from fastserve.workload.transformations import mean_rate

OPTIONS = ARRIVAL_OPTIONS
ROWS: Mapping[str, Callable[[ClassFigures], float | None]] = {
    "requests": lambda of: of.requests,
    "served": lambda of: of.served,
    "TTFT mean, s": lambda of: of.first_token_mean,
    "TTFT p50, s": lambda of: of.first_token_p50,
    "TTFT p99, s": lambda of: of.first_token_p99,
    "completion mean, s": lambda of: of.completion_mean,
    "completion p99, s": lambda of: of.completion_p99,
    "completion per output token, mean, s": lambda of: of.normalized_latency_mean,
    "output tokens/s": lambda of: of.tokens_per_second,
}
"""Of the table, with where each is from."""


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """The options that no other kind of run has."""
    add_arrival_arguments(group)


def run(targets: Mapping[str, Target], arrivals: Sequence[Arrival], arguments: argparse.Namespace) -> int:
    """Replays a workload to the targets in turn, and prints a table for each.

    The exit status is 1 if a target has served nothing. Raises WriteError, and what a target raises besides
    refusals.
    """
    console = Console()
    runs: list[dict[str, Any]] = []
    rate = f", {mean_rate(arrivals):.3g} a second" if arrivals[-1].time > arrivals[0].time else ""
    console.print(f"{len(arrivals)} requests in {arrivals[-1].time:.1f} s{rate}", soft_wrap=True)
    # Each target gets other prompts, since two may be ways to one server, whose prefix cache must not answer.
    for seed, (name, target) in enumerate(targets.items(), start=arguments.seed + 1):
        run_load(target, random_jobs(2, arguments.seed), 2)  # warm up
        with Progress(console=Console(stderr=True), transient=True) as progress:
            advance = partial(progress.advance, progress.add_task(name, total=len(arrivals)))
            records = replay(target, arrivals, seed, on_end=advance)
        figures = replay_figures(records)
        _print(console, name, figures)
        runs.append({"target": name, "figures": figures, "requests": records})
    if arguments.json is not None:
        write_bytes(arguments.json, msgspec.json.encode({"workload": described(arguments), "runs": runs}))
    return 0 if all(run["figures"].classes[-1].served for run in runs) else 1


def figures_table(title: str, figures: ReplayFigures) -> Table:
    """A column for each priority class, and one for all."""
    table = Table("priority", title=title)
    for row in figures.classes:
        table.add_column("all" if row.priority is None else str(row.priority), justify="right")
    for label, value_of in ROWS.items():
        table.add_row(label, *map(_written, map(value_of, figures.classes)))
    return table


def _written(value: float | None) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return "" if value is None else str(value)


def _print(console: Console, name: str, figures: ReplayFigures) -> None:
    console.print(figures_table(name, figures))
    for code, count in figures.errors.items():
        console.print(f"{count} requests ended with {code}")
    late = figures.lateness
    console.print(
        f"sent after they were due: {1e3 * late.p50:.1f} ms (median), {1e3 * late.p99:.1f} ms (p99), "
        f"{1e3 * late.largest:.1f} ms (most); {late.late} by more than {1e3 * LATE_SECONDS:g} ms",
        soft_wrap=True,
    )
