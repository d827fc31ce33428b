"""`fastserve bench --profile`: where the time of a decode step goes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from fastserve.commands.closed_loop import CLIENTS
from fastserve.config import ConfigError

if TYPE_CHECKING:
    from fastserve.benchmark.step_profile import StepProfile

CONTEXT_LEN = 200


def run(arguments: argparse.Namespace) -> int:
    """Prints a table for each number of sequences. Raises ModelError, and ConfigError."""
    if arguments.profile < 1:
        raise ConfigError(f"--profile: got {arguments.profile}; allowed: at least 1")
    from fastserve.benchmark.step_profile import Machine, profile_steps  # which loads torch

    console, machine = Console(), Machine.measure()
    console.print(
        f"reading {machine.bytes_per_second / 1e9:.1f} GB/s; multiplications and additions of bytes "
        f"{machine.byte_products_per_second / 1e9:.0f} G/s, of bfloat16 "
        f"{machine.bfloat16_products_per_second / 1e9:.0f} G/s",
        soft_wrap=True,
    )
    counts = arguments.clients or CLIENTS
    for profile in profile_steps(arguments.model, machine, counts, arguments.profile, arguments.seed):
        console.print(_table(profile))
    return 0


def _table(profile: StepProfile) -> Table:
    title = f"a step of {profile.num_seqs} sequences of {profile.context_len} tokens"
    table = Table("part", "ms", "share", "floor, ms", "x floor", title=title)
    for part in profile.parts:
        table.add_row(part.name, *_figures(part.seconds, profile.seconds, part.floor))
    table.add_section()
    floor = sum(part.floor or 0.0 for part in profile.parts)
    table.add_row("the step", *_figures(profile.seconds, profile.seconds, floor))
    return table


def _figures(seconds: float, whole: float, floor: float | None) -> list[str]:
    written = [f"{1e3 * seconds:.2f}", f"{seconds / whole:.0%}"]
    return written if floor is None else [*written, f"{1e3 * floor:.2f}", f"{seconds / floor:.2f}"]
