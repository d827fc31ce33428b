"""The closed loop of `fastserve bench`."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from fastserve.benchmark.closed_loop import Figures, run_load
from fastserve.benchmark.job import Job, random_jobs
from fastserve.benchmark.targets import Target
from fastserve.commands.workload_options import REQUESTS, check_lengths
from fastserve.config import ConfigError
from fastserve.workload.lengths import CHAT_OUTPUTS, CHAT_PROMPTS

CLIENTS = [1, 4, 16, 32]
OPTIONS = ("clients", "rounds")


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """The options that no other kind of run has."""
    group.add_argument("--clients", type=int, nargs="+", metavar="N", help="(default: 1 4 16 32)")
    group.add_argument("--rounds", type=int, metavar="N", help="runs of each, medians shown (default: 1)")


def run(targets: Mapping[str, Target], arguments: argparse.Namespace) -> int:
    """Loads the targets in turn and prints a table. Raises what a request raises."""
    for target in targets.values():
        run_load(target, _jobs(arguments, arguments.seed)[:2], 2)  # warm up
    Console().print(_table(_measure(targets, arguments)))
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for a number that cannot be."""
    check_lengths(arguments)
    if min(arguments.clients or CLIENTS) < 1:
        raise ConfigError(f"--clients: got {arguments.clients}; allowed: at least 1 each")
    if arguments.rounds is not None and arguments.rounds < 1:
        raise ConfigError(f"--rounds: got {arguments.rounds}; allowed: at least 1")


def _jobs(arguments: argparse.Namespace, seed: int) -> list[Job]:
    return random_jobs(
        arguments.requests or REQUESTS,
        seed,
        arguments.prompt_tokens or CHAT_PROMPTS,
        arguments.output_tokens or CHAT_OUTPUTS,
    )


def _measure(
    targets: Mapping[str, Target], arguments: argparse.Namespace
) -> dict[tuple[int, str], list[Figures]]:
    """Targets in turn, round by round, so that the machine's drift falls on all of them."""
    results: dict[tuple[int, str], list[Figures]] = {}
    seed = arguments.seed
    for num_clients in arguments.clients or CLIENTS:
        for _ in range(arguments.rounds or 1):
            for name, target in targets.items():
                seed += 1  # new prompts each time: the prefix cache must not answer for the engine
                figures = run_load(target, _jobs(arguments, seed), num_clients)
                results.setdefault((num_clients, name), []).append(figures)
    return results


def _table(results: dict[tuple[int, str], list[Figures]]) -> Table:
    table = Table(
        "clients", "target", "output tok/s", "TTFT p50 ms", "TTFT p99 ms", "TPOT p50 ms", "TPOT p99 ms"
    )
    for (num_clients, name), runs in results.items():
        columns = [
            [run.tokens_per_second for run in runs],
            [run.first_token_ms(50) for run in runs],
            [run.first_token_ms(99) for run in runs],
            [run.per_output_token_ms(50) for run in runs],
            [run.per_output_token_ms(99) for run in runs],
        ]
        table.add_row(str(num_clients), name, *(f"{statistics.median(column):.1f}" for column in columns))
    return table
