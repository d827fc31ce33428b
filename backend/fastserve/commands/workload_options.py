"""The options that describe a workload: how many requests, how long, and when they come."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastserve.config import ConfigError
from fastserve.config_flags import flag
from fastserve.workload.arrival import Arrival
from fastserve.workload.lengths import CHAT_OUTPUTS, CHAT_PROMPTS, LogNormalLengths
from fastserve.workload.synthetic import synthetic_arrivals
from fastserve.workload.trace import load_trace
from fastserve.workload.transformations import (
    at_rate,
    at_speed,
    cut_lengths,
    draw_priorities,
    draw_tenants,
    scale_lengths,
)

REQUESTS = 64
"""Drawn unless told otherwise."""
LENGTHS = "N|MEAN,SIGMA,LOW,HIGH"
LENGTH_OPTIONS = ("prompt_tokens", "output_tokens")
"""Those of lengths that are drawn."""
SOURCES = ("trace", "poisson", "gamma")
TIME_OPTIONS = ("rate", "speed", "load", "load_of")
"""Those that scale a trace's time; a synthetic workload has its rate."""
ARRIVAL_OPTIONS = (
    *SOURCES,
    *TIME_OPTIONS,
    "length_scale",
    "max_prompt_tokens",
    "max_output_tokens",
    "priorities",
    "tenants",
)
"""Those of requests that come when they are due."""


def add_length_arguments(parser: argparse.ArgumentParser) -> None:
    """How many requests, and how long they are."""
    parser.add_argument(
        "--requests", type=int, metavar="N", help=f"(default: {REQUESTS}; of a trace: all that it has)"
    )
    for name, chat in (("prompt", CHAT_PROMPTS), ("output", CHAT_OUTPUTS)):
        parser.add_argument(
            f"--{name}-tokens",
            type=_lengths,
            metavar=LENGTHS,
            help="all so long, or log-normal: mean before clipping, standard deviation of the logarithm, "
            f"limits (default: {chat.mean:g},{chat.sigma:g},{chat.low},{chat.high})",
        )
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)")


def add_arrival_arguments(group: argparse._ArgumentGroup) -> None:
    """Where the requests come from, and what is made of them."""
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--trace", type=Path, metavar="FILE", help="a trace of Azure's (CSV) or Mooncake's (JSON lines)"
    )
    source.add_argument("--poisson", type=float, metavar="RATE", help="Poisson arrivals, RATE a second")
    source.add_argument(
        "--gamma",
        type=_gamma,
        metavar="RATE,CV",
        help="gaps of a gamma distribution: bursts if CV is above 1",
    )
    scale = group.add_mutually_exclusive_group()
    scale.add_argument("--rate", type=float, metavar="RATE", help="the trace's time stretched to this rate")
    scale.add_argument("--speed", type=float, metavar="FACTOR", help="the trace's time passes so fast")
    scale.add_argument("--load", type=float, metavar="FACTOR", help="the rate is so much of --load-of")
    group.add_argument("--load-of", type=float, metavar="RATE", help="load 1.0, in requests a second")
    group.add_argument(
        "--length-scale", type=float, metavar="FACTOR", help="prompts and answers are so much as long"
    )
    group.add_argument("--max-prompt-tokens", type=int, metavar="N", help="longer prompts are cut")
    group.add_argument("--max-output-tokens", type=int, metavar="N", help="longer answers are cut")
    group.add_argument(
        "--priorities", type=_priorities, metavar="P:SHARE,...", help="drawn for each, as 10:0.1,0:0.9"
    )
    group.add_argument("--tenants", type=_shares, metavar="NAME:SHARE,...", help="drawn for each, as a:3,b:1")


def has_arrivals(arguments: argparse.Namespace) -> bool:
    """Whether the arguments say when requests come."""
    return any(getattr(arguments, source) is not None for source in SOURCES)


def check_lengths(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for a number that cannot be."""
    for name, least in (("requests", 1), ("seed", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"{flag(name)}: got {value}; allowed: at least {least}")


def arrivals_of(arguments: argparse.Namespace) -> list[Arrival]:
    """The workload that the arguments describe.

    Raises TraceError, and ConfigError for what cannot be or would not be read.
    """
    check_lengths(arguments)
    unread, where = (TIME_OPTIONS, "only") if arguments.trace is None else (LENGTH_OPTIONS, "not")
    for name in unread:
        if getattr(arguments, name) is not None:
            raise ConfigError(f"{flag(name)}: {where} with --trace")
    if (arguments.load is None) != (arguments.load_of is None):
        raise ConfigError("--load, --load-of: only together")
    try:
        return _transformed(_of_trace(arguments) if arguments.trace else _synthetic(arguments), arguments)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def described(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that made the workload, of a trace only the file's name."""
    names = ("seed", "requests", *LENGTH_OPTIONS, *ARRIVAL_OPTIONS)
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return {name: value.name if isinstance(value, Path) else value for name, value in given.items()}


def _of_trace(arguments: argparse.Namespace) -> list[Arrival]:
    arrivals = load_trace(arguments.trace)[: arguments.requests]
    if arguments.rate is not None:
        return at_rate(arrivals, arguments.rate)
    if arguments.load is not None:
        return at_rate(arrivals, arguments.load * arguments.load_of)
    return arrivals if arguments.speed is None else at_speed(arrivals, arguments.speed)


def _synthetic(arguments: argparse.Namespace) -> list[Arrival]:
    rate, cv = arguments.gamma or (arguments.poisson, 1.0)
    return synthetic_arrivals(
        arguments.requests or REQUESTS,
        rate,
        arguments.prompt_tokens or CHAT_PROMPTS,
        arguments.output_tokens or CHAT_OUTPUTS,
        arguments.seed,
        cv,
    )


def _transformed(arrivals: list[Arrival], arguments: argparse.Namespace) -> list[Arrival]:
    if arguments.length_scale is not None:
        arrivals = scale_lengths(arrivals, arguments.length_scale)
    arrivals = cut_lengths(arrivals, arguments.max_prompt_tokens, arguments.max_output_tokens)
    if arguments.priorities is not None:
        arrivals = draw_priorities(arrivals, arguments.priorities, arguments.seed)
    if arguments.tenants is not None:
        arrivals = draw_tenants(arrivals, arguments.tenants, arguments.seed)
    return arrivals


def _lengths(text: str) -> LogNormalLengths:
    """The lengths that an option names. Raises argparse.ArgumentTypeError."""
    try:
        if "," not in text:
            return LogNormalLengths.equal(int(text))
        mean, sigma, low, high = text.split(",")
        return LogNormalLengths(float(mean), float(sigma), int(low), int(high))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: {LENGTHS} ({error})") from error


def _gamma(text: str) -> tuple[float, float]:
    try:
        rate, cv = map(float, text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: RATE,CV") from error
    return rate, cv


def _priorities(text: str) -> dict[int, float]:
    return _shares(text, int)


def _shares(text: str, kind: Callable[[str], Any] = str) -> dict[Any, float]:
    """Values and their shares. Raises argparse.ArgumentTypeError."""
    try:
        pairs = [each.rpartition(":") for each in text.split(",")]
        return {kind(value): float(share) for value, _, share in pairs}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: VALUE:SHARE,VALUE:SHARE,...") from error
