"""`fastserve bench`: closed-loop load on a server, on the engine inside this process, or on both in turn."""

from __future__ import annotations

import argparse
import statistics

from rich.console import Console
from rich.table import Table

from fastserve.benchmark.load import Figures, run_load
from fastserve.benchmark.targets import InProcessTarget, ServerTarget, Target
from fastserve.benchmark.workload import Job, chat_jobs, equal_jobs
from fastserve.checkpoints.model_error import ModelError
from fastserve.errors import RequestError
from fastserve_client import FastServeError

ERRORS = (FastServeError, ModelError, RequestError)
TARGETS = ("grpc", "http", "in-process")
DEFAULT_URLS = {"grpc": "127.0.0.1:8001", "http": "127.0.0.1:8000"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The targets, and the load on them."""
    parser.add_argument(
        "--target", nargs="+", choices=TARGETS, default=["grpc"], help="measured in turn (default: grpc)"
    )
    parser.add_argument("--grpc-url", default=DEFAULT_URLS["grpc"], help="(default: %(default)s)")
    parser.add_argument("--http-url", default=DEFAULT_URLS["http"], help="(default: %(default)s)")
    parser.add_argument("--model", default="", help="for in-process (default: the default model)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 32], help="(default: 1 4 16 32)")
    parser.add_argument("--requests", type=int, default=64, help="in each run (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=1, help="runs of each, medians shown (default: %(default)s)"
    )
    parser.add_argument(
        "--prompt-tokens", type=int, help="all prompts so long (default: log-normal, mean 160, 16 to 512)"
    )
    parser.add_argument(
        "--output-tokens", type=int, help="all answers so long (default: log-normal, mean 120, 8 to 256)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the lengths and prompts (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Loads the targets in turn and prints a table. Raises what a request raises."""
    targets = {name: _target(name, arguments) for name in arguments.target}
    try:
        for target in targets.values():
            run_load(target, _jobs(arguments, seed=-1)[:2], 2)  # warm up
        results = _measure(targets, arguments)
    finally:
        for target in targets.values():
            target.close()
    Console().print(_table(results))
    return 0


def _target(name: str, arguments: argparse.Namespace) -> Target:
    if name == "in-process":
        return InProcessTarget(arguments.model)
    if name == "http":
        return ServerTarget(arguments.http_url, "http")
    return ServerTarget(arguments.grpc_url, "grpc")


def _jobs(arguments: argparse.Namespace, seed: int) -> list[Job]:
    if arguments.prompt_tokens or arguments.output_tokens:
        return equal_jobs(
            arguments.requests, arguments.prompt_tokens or 160, arguments.output_tokens or 120, seed
        )
    return chat_jobs(arguments.requests, seed)


def _measure(
    targets: dict[str, Target], arguments: argparse.Namespace
) -> dict[tuple[int, str], list[Figures]]:
    """Targets in turn, round by round, so that the machine's drift falls on all of them."""
    results: dict[tuple[int, str], list[Figures]] = {}
    seed = arguments.seed
    for num_clients in arguments.clients:
        for _ in range(arguments.rounds):
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
