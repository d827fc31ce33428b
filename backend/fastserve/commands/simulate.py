"""`fastserve simulate`: policies side by side on one workload, with the server's own scheduling code."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fastserve.atomic_write import WriteError, write_bytes
from fastserve.commands.workload_options import (
    add_arrival_arguments,
    add_length_arguments,
    arrivals_of,
    described,
    has_arrivals,
)
from fastserve.config import Config, ConfigError
from fastserve.config_flags import add_config_flags, config_from, flag
from fastserve.scheduling.replica import LOST_AFTER_SECONDS
from fastserve.simulation.capacity import Capacity, measure_capacity
from fastserve.simulation.default_step_time import DEFAULT_STEP_TIME
from fastserve.simulation.figures import GOODPUT_SHARE, Objective, RunFigures, goodput, run_figures
from fastserve.simulation.plots import write_goodput_plot, write_load_plots
from fastserve.simulation.policies import CLAIRVOYANT, NAMES, policy_factory
from fastserve.simulation.result import SimulationResult
from fastserve.simulation.settings import ROUTINGS, SimulationSettings
from fastserve.simulation.simulation import Simulation
from fastserve.simulation.step_time import StepTimeError, StepTimeModel
from fastserve.workload.arrival import Arrival
from fastserve.workload.trace import TraceError
from fastserve.workload.transformations import at_rate, draw_length_hints, mean_rate

ERRORS = (StepTimeError, TraceError, WriteError)
DEFAULT_CACHE_BYTES = 1 << 30
SETTINGS = (
    "replicas",
    "max_num_seqs",
    "max_num_batched_tokens",
    "target_itl_ms",
    "block_size",
    "kv_cache_bytes",
    "swap_space_bytes",
    "enable_prefix_caching",
    "alpha",
    "beta",
    "starvation_seconds",
    "tenant_weights",
)
"""The server's settings that a simulation goes by."""
LOADS = "1.0"
HEADINGS = (
    "TTFT\nmean s",
    "\np50",
    "\np99",
    "whole\nmean s",
    "\np99",
    "s per\ntoken",
    "tokens\na s",
    "preemp-\ntions",
    "recom-\nputed",
)
"""The last one is of a whole run."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The policies, the workload, the engine and what is written."""
    parser.add_argument(
        "--policies", default=",".join(NAMES), metavar="NAME,...", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--loads",
        metavar="FACTOR,...",
        help="arrival rates, 1.0 being the one at which fcfs just keeps up, which is measured first "
        f"(default: the workload's own rate; {LOADS} where none is given)",
    )
    add_length_arguments(parser)
    add_arrival_arguments(parser.add_argument_group("arrivals (default: Poisson)"))
    parser.add_argument(
        "--step-times",
        type=Path,
        metavar="FILE",
        help="as `fastserve bench --calibrate` writes it (default: the default model on two cores)",
    )
    parser.add_argument(
        "--routing",
        choices=ROUTINGS,
        default="prefix",
        help="to replicas (default: %(default)s, as the server does)",
    )
    parser.add_argument(
        "--message-delay-ms",
        type=float,
        default=0.0,
        metavar="X",
        help="of a message between queue and replica (default: %(default)s)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="that every request asks for (default: the workload's longest answer)",
    )
    parser.add_argument(
        "--hint-sigma",
        type=float,
        metavar="SIGMA",
        help="requests say how long their answers will be, off by a log-normal factor of this sigma; 0: the "
        "truth (default: they say nothing)",
    )
    for name, what in (("kv-blocks", "the KV cache"), ("host-blocks", "host memory")):
        parser.add_argument(
            f"--{name}",
            type=_blocks,
            metavar="N|N%",
            help=f"{what} of a replica holds, in place of bytes; N%%: of what a full batch uses under fcfs",
        )
    parser.add_argument("--ttft-slo", type=float, default=Objective().ttft_seconds, metavar="SECONDS")
    parser.add_argument("--token-slo", type=float, default=Objective().token_seconds, metavar="SECONDS")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures are written")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where plots are written")
    add_config_flags(parser, SETTINGS)


def run(arguments: argparse.Namespace) -> int:
    """Simulates every policy at every load, and prints a table for each load.

    Raises ConfigError, and what is in ERRORS.
    """
    config = config_from(arguments)
    objective = Objective(arguments.ttft_slo, arguments.token_slo)
    factories = {name: policy_factory(name, config) for name in _names(arguments.policies)}
    arrivals, loads = _workload(arguments)
    settings = _settings(arguments, config)
    console = Console()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("capacity", total=len(arrivals))
        advance = partial(_advance, progress, task)
        try:
            capacity = measure_capacity(arrivals, settings, advance)
            settings = _sized(settings, arguments, capacity)
            console.print(_summary(arrivals, settings, capacity))
            runs: list[RunFigures] = []
            for load in loads or [mean_rate(arrivals) / capacity.requests_per_second]:
                rate = load * capacity.requests_per_second
                results: dict[str, SimulationResult] = {}
                scaled = at_rate(arrivals, rate) if loads else arrivals
                for name, make_policy in factories.items():
                    progress.reset(task, description=f"{name} at {load:.3g}", total=len(arrivals))
                    results[name] = Simulation(
                        scaled,
                        make_policy,
                        settings,
                        is_clairvoyant=name in CLAIRVOYANT,
                        max_tokens=arguments.max_tokens,
                        length_hints=_length_hints(arguments, scaled),
                        on_end=advance,
                    ).run()
                figures = [
                    run_figures(result, name, load, rate, config.replicas, objective)
                    for name, result in results.items()
                ]
                _print(console, figures)
                runs += figures
                if arguments.out is not None:
                    _tell(console, write_load_plots(arguments.out, load, results))
        except ValueError as error:  # a workload that cannot be simulated so
            raise ConfigError(str(error)) from error
    _print_goodput(console, runs, objective)
    if arguments.out is not None:
        _tell(console, [write_goodput_plot(arguments.out, runs)])
    if arguments.json is not None:
        report = {"workload": described(arguments), "capacity": capacity, "runs": runs}
        write_bytes(arguments.json, msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    return 0


def _length_hints(arguments: argparse.Namespace, arrivals: Sequence[Arrival]) -> list[int] | None:
    if arguments.hint_sigma is None:
        return None
    max_tokens = arguments.max_tokens or max(arrival.num_output_tokens for arrival in arrivals)
    return draw_length_hints(arrivals, arguments.hint_sigma, max_tokens, arguments.seed)


def _advance(progress: Progress, task: int, count: int) -> None:
    progress.update(task, completed=count)  # type: ignore[arg-type]  # rich's TaskID is an int


def _names(text: str) -> list[str]:
    names = text.split(",")
    if not all(names) or len(set(names)) < len(names):
        raise ConfigError(f"--policies: got {text!r}; allowed: names, each once: {', '.join(NAMES)}")
    return names


def _workload(arguments: argparse.Namespace) -> tuple[list[Arrival], list[float]]:
    """The arrivals, and the loads that they are to be simulated at; none: at their own rate."""
    if not has_arrivals(arguments):
        arguments.poisson = 1.0
        arguments.loads = arguments.loads or LOADS
    try:
        loads = [float(load) for load in arguments.loads.split(",")] if arguments.loads else []
    except ValueError:
        loads = [0.0]
    if not all(0 < load < 100 for load in loads):
        raise ConfigError(f"--loads: got {arguments.loads!r}; allowed: numbers above 0, as 0.9,1.0,1.1")
    for name in ("rate", "speed", "load"):
        if loads and getattr(arguments, name) is not None:
            raise ConfigError(f"{flag(name)}: not with --loads, which says how time is scaled")
    return arrivals_of(arguments), loads


def _settings(arguments: argparse.Namespace, config: Config) -> SimulationSettings:
    if not 0 <= arguments.message_delay_ms < 1e3 * LOST_AFTER_SECONDS:
        raise ConfigError(
            f"--message-delay-ms: got {arguments.message_delay_ms}; allowed: 0 or more, and below "
            f"{1e3 * LOST_AFTER_SECONDS:g}, after which the queue takes a message for lost"
        )
    path: Path | None = arguments.step_times
    step_time = DEFAULT_STEP_TIME if path is None else StepTimeModel.load(path)
    block_bytes = config.block_size * step_time.kv_bytes_per_token
    return SimulationSettings(
        step_time,
        num_replicas=config.replicas,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        target_itl_seconds=config.target_itl_ms / 1e3,
        block_size=config.block_size,
        num_blocks=(config.kv_cache_bytes or DEFAULT_CACHE_BYTES) // block_bytes,
        num_host_blocks=config.swap_space_bytes // block_bytes,
        enable_prefix_caching=config.enable_prefix_caching,
        message_delay=arguments.message_delay_ms / 1e3,
        routing=arguments.routing,
    )


def _sized(
    settings: SimulationSettings, arguments: argparse.Namespace, capacity: Capacity
) -> SimulationSettings:
    """With the block numbers that were asked for."""

    def count(value: tuple[float, bool] | None, default: int) -> int:
        if value is None:
            return default
        number, is_share = value
        return round(number * capacity.mean_used_blocks if is_share else number)

    return replace(
        settings,
        num_blocks=count(arguments.kv_blocks, settings.num_blocks),
        num_host_blocks=count(arguments.host_blocks, settings.num_host_blocks),
    )


def _blocks(text: str) -> tuple[float, bool]:
    """A number, and whether it is a share. Raises argparse.ArgumentTypeError."""
    try:
        number = float(text.removesuffix("%")) / 100 if text.endswith("%") else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a number of blocks, or N%") from error
    if number < 0:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: 0 or more")
    return number, text.endswith("%")


def _summary(arrivals: Sequence[Arrival], settings: SimulationSettings, capacity: Capacity) -> str:
    return (
        f"{len(arrivals)} requests on {settings.num_replicas} replica(s) of {settings.num_blocks} KV blocks "
        f"and {settings.num_host_blocks} in host memory; load 1.0 is {capacity.requests_per_second:.4g} "
        f"requests a second, and a full batch uses {capacity.mean_used_blocks:.0f} blocks"
    )


def _print(console: Console, runs: Sequence[RunFigures]) -> None:
    """A table for each class, narrow enough for a terminal."""
    for number, first in enumerate(runs[0].classes):
        is_last = first.priority is None
        which = "all requests" if is_last else f"priority {first.priority}"
        table = Table(
            title=f"load {runs[0].load:.3g} ({runs[0].rate:.4g} a second), {which}",
            box=SIMPLE,
            padding=(0, 1, 0, 0),
        )
        table.add_column("\npolicy")
        for name in HEADINGS if is_last else HEADINGS[:-1]:
            table.add_column(name, justify="right")
        for each in runs:
            row = each.classes[number]
            cells = [
                *map(_seconds, (row.ttft_mean, row.ttft_p50, row.ttft_p99)),
                *map(_seconds, (row.completion_mean, row.completion_p99, row.normalized_latency_mean)),
                f"{row.tokens_per_second:.1f}",
                str(row.preemptions),
            ]
            table.add_row(each.policy, *cells, *([f"{each.computed_over_needed - 1:.2%}"] if is_last else []))
        console.print(table)


def _seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _print_goodput(console: Console, runs: Sequence[RunFigures], objective: Objective) -> None:
    for policy in dict.fromkeys(run_.policy for run_ in runs):
        load = goodput([run_ for run_ in runs if run_.policy == policy])
        if load is not None:
            console.print(
                f"{policy}: up to load {load:.3f}, {GOODPUT_SHARE:.0%} of requests have their first token "
                f"within {objective.ttft_seconds:g} s and {objective.token_seconds:g} s per token"
            )


def _tell(console: Console, paths: Sequence[Path]) -> None:
    for path in paths:
        console.print(str(path), soft_wrap=True)
