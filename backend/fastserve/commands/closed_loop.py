"""The closed loop of `fastserve bench`."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fastserve.atomic_write import write_bytes
from fastserve.benchmark.closed_loop import Figures, run_load
from fastserve.benchmark.job import Job, random_jobs
from fastserve.benchmark.other_load import BUSY, other_load
from fastserve.benchmark.targets import Target
from fastserve.commands.workload_options import REQUESTS, check_lengths
from fastserve.config import ConfigError
from fastserve.workload.lengths import CHAT_OUTPUTS, CHAT_PROMPTS

CLIENTS = [1, 4, 16, 32]
OPTIONS = ("clients", "rounds", "prefix_tokens", "plot")
COLUMNS: Mapping[str, Callable[[Figures], float]] = {
    "tok/s": lambda run: run.tokens_per_second,
    "TTFT p50": lambda run: run.first_token_ms(50),
    "TTFT p99": lambda run: run.first_token_ms(99),
    "TPOT p50": lambda run: run.per_output_token_ms(50),
    "ITL p50": lambda run: run.inter_token_ms(50),
    "ITL p99": lambda run: run.inter_token_ms(99),
    "responses/token": lambda run: run.responses_per_token,
}
"""Of the table and of the file, with where each is from: output tokens per second, milliseconds."""
SAMPLE_SECONDS = 0.5
"""Before and after each run, to see what else the machine does."""
TABLE_WIDTH = 130
"""Characters, where there is no terminal."""


@dataclass(frozen=True)
class Run:
    """One load on one target."""

    clients: int
    target: str
    round: int
    figures: dict[str, float]
    """By the names of COLUMNS."""
    other_load: float
    """Cores that others used, just before or just after: the more of both."""

    @property
    def is_disturbed(self) -> bool:
        """Whether others used so much that the figures are of no worth."""
        return self.other_load > BUSY


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """The options that no other kind of run has."""
    group.add_argument("--clients", type=int, nargs="+", metavar="N", help="(default: 1 4 16 32)")
    group.add_argument("--rounds", type=int, metavar="N", help="runs of each, medians shown (default: 1)")
    group.add_argument(
        "--prefix-tokens", type=int, metavar="N", help="put before each prompt, the same of all (default: 0)"
    )
    group.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="where tokens per second by clients are drawn, as .png or .svg",
    )


def run(targets: Mapping[str, Target], arguments: argparse.Namespace) -> int:
    """Loads the targets in turn, prints a table, and writes its runs and a plot.

    Raises what a request raises, and WriteError.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    for target in targets.values():
        run_load(target, _jobs(arguments, arguments.seed)[:2], 2)  # warm up
    runs = _measure(targets, arguments)
    console.print(_table(runs))
    if disturbed := sum(each.is_disturbed for each in runs):
        console.print(
            f"*: {disturbed} of {len(runs)} runs were beside others' load of more than {BUSY:.0%} of a core, "
            "and count only where there is no other run",
            soft_wrap=True,
        )
    if arguments.json is not None:
        from fastserve.benchmark.machine import machine  # which loads torch

        report = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "runs": runs}
        write_bytes(arguments.json, msgspec.json.format(msgspec.json.encode(report)))
    if arguments.plot is not None:
        from fastserve.benchmark.throughput_plot import write_throughput_plot  # which loads matplotlib

        write_throughput_plot(arguments.plot, _lines(runs))
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for a number that cannot be."""
    check_lengths(arguments)
    if min(arguments.clients or CLIENTS) < 1:
        raise ConfigError(f"--clients: got {arguments.clients}; allowed: at least 1 each")
    if arguments.rounds is not None and arguments.rounds < 1:
        raise ConfigError(f"--rounds: got {arguments.rounds}; allowed: at least 1")
    if arguments.prefix_tokens is not None and arguments.prefix_tokens < 0:
        raise ConfigError(f"--prefix-tokens: got {arguments.prefix_tokens}; allowed: 0 or more")
    if arguments.plot is not None and arguments.plot.suffix not in (".png", ".svg"):
        raise ConfigError(f"--plot: got {arguments.plot}; allowed: a name that ends in .png or .svg")


def _jobs(arguments: argparse.Namespace, seed: int, number: int = 0) -> list[Job]:
    """Of target `number`: as long as those of the others, with other tokens, since two targets may be ways to
    one server, whose prefix cache must not answer for the engine."""
    count = arguments.requests or REQUESTS
    return random_jobs(
        count,
        seed,
        arguments.prompt_tokens or CHAT_PROMPTS,
        arguments.output_tokens or CHAT_OUTPUTS,
        first_number=number * count,
        num_prefix_tokens=arguments.prefix_tokens or 0,
    )


def _measure(targets: Mapping[str, Target], arguments: argparse.Namespace) -> list[Run]:
    """Targets in turn, round by round, so that the machine's drift falls on all of them."""
    runs = []
    clients, rounds = arguments.clients or CLIENTS, arguments.rounds or 1
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(clients) * rounds * len(targets))
        seed = arguments.seed
        for num_clients in clients:
            for number in range(rounds):
                seed += 1
                for index, (name, target) in enumerate(targets.items()):
                    progress.update(task, description=f"{num_clients} clients, {name}")
                    jobs = _jobs(arguments, seed, index)
                    others = other_load(SAMPLE_SECONDS)
                    figures = run_load(target, jobs, num_clients)
                    others = max(others, other_load(SAMPLE_SECONDS))
                    columns = {column: value_of(figures) for column, value_of in COLUMNS.items()}
                    runs.append(Run(num_clients, name, number, columns, others))
                    progress.advance(task)
    return runs


def _counted(runs: list[Run]) -> dict[tuple[int, str], list[Run]]:
    """The runs by clients and target: those that nobody disturbed, if there are any."""
    grouped: dict[tuple[int, str], list[Run]] = {}
    for each in runs:
        grouped.setdefault((each.clients, each.target), []).append(each)
    return {key: [run for run in group if not run.is_disturbed] or group for key, group in grouped.items()}


def _table(runs: list[Run]) -> Table:
    """Medians; and how many times the first target's tokens per second each has, the median of the rounds."""
    first = runs[0].target
    throughput = next(iter(COLUMNS))
    counted = _counted(runs)
    table = Table("clients", "target", *COLUMNS, f"x {first}", "others' load", title="times in milliseconds")
    for (num_clients, name), group in counted.items():
        baselines = {each.round: each.figures[throughput] for each in counted[num_clients, first]}
        ratios = [
            each.figures[throughput] / baselines[each.round] for each in group if each.round in baselines
        ]
        medians = [statistics.median(each.figures[column] for each in group) for column in COLUMNS]
        others = max(each.other_load for each in group)
        mark = " *" if others > BUSY else ""
        written = [f"{value:.2f}" if value < 10 else f"{value:.1f}" for value in medians]
        ratio = f"{statistics.median(ratios):.2f}" if ratios else ""
        table.add_row(str(num_clients), name, *written, ratio, f"{others:.0%}{mark}")
    return table


def _lines(runs: list[Run]) -> dict[str, list[tuple[int, float]]]:
    """Each target's points: clients, and the median of its tokens per second."""
    throughput = next(iter(COLUMNS))
    lines: dict[str, list[tuple[int, float]]] = {}
    for (num_clients, name), group in _counted(runs).items():
        median = statistics.median(each.figures[throughput] for each in group)
        lines.setdefault(name, []).append((num_clients, median))
    return {name: sorted(points) for name, points in lines.items()}
