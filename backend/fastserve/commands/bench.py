"""`fastserve bench`: load on a server, on the engine inside this process, or on both in turn.

Closed loop: clients that each send a request when their last one has ended. Open loop: requests that come
when a trace or a distribution says so. Calibration: the seconds of the engine's steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

from rich.console import Console

from fastserve.atomic_write import WriteError
from fastserve.benchmark.targets import InferTarget, InProcessTarget, ServerTarget, Target
from fastserve.checkpoints.model_error import ModelError
from fastserve.commands import closed_loop, open_loop
from fastserve.commands.workload_options import (
    LENGTH_OPTIONS,
    add_length_arguments,
    arrivals_of,
    has_arrivals,
)
from fastserve.config import ConfigError
from fastserve.config_flags import flag
from fastserve.errors import RequestError
from fastserve.workload.trace import TraceError
from fastserve_client import FastServeError

ERRORS = (FastServeError, ModelError, RequestError, TraceError, WriteError)
DEFAULT_URLS = {"grpc": "127.0.0.1:8001", "http": "127.0.0.1:8000"}
LOAD_OPTIONS = ("target", "grpc_url", "http_url", "requests", *LENGTH_OPTIONS)
"""Those that a closed loop and an open one have in common."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The targets, and the load on them."""
    parser.add_argument(
        "--target",
        nargs="+",
        choices=("grpc", "http", "infer", "in-process"),
        help="measured in turn (default: grpc); infer: `fastserve_infer` over gRPC, with one response",
    )
    for name, url in DEFAULT_URLS.items():
        parser.add_argument(f"--{name}-url", help=f"(default: {url})")
    parser.add_argument("--model", default="", help="for in-process (default: the default model)")
    add_length_arguments(parser)
    closed_loop.add_arguments(parser.add_argument_group("closed loop"))
    open_loop.add_arguments(parser.add_argument_group("open loop, with --trace, --poisson or --gamma"))
    parser.add_argument_group("calibration").add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="in place of load: measure the engine's steps inside this process, and write how long they take",
    )


def run(arguments: argparse.Namespace) -> int:
    """Loads the targets in turn and prints a table. Raises ConfigError, and what is in ERRORS."""
    _check_directories(arguments)
    if arguments.calibrate is not None:
        _refuse(arguments, (*LOAD_OPTIONS, *closed_loop.OPTIONS, *open_loop.OPTIONS), "with --calibrate")
        return _calibrate(arguments)
    with ExitStack() as stack:
        if has_arrivals(arguments):
            _refuse(arguments, closed_loop.OPTIONS, "in an open loop")
            arrivals = arrivals_of(arguments)
            return open_loop.run(_targets(arguments, stack, retries=0), arrivals, arguments)
        _refuse(arguments, open_loop.OPTIONS, "in a closed loop")
        closed_loop.check(arguments)
        return closed_loop.run(_targets(arguments, stack), arguments)


def _refuse(arguments: argparse.Namespace, names: tuple[str, ...], where: str) -> None:
    """Raises ConfigError for an option that is given but would not be read."""
    for name in names:
        if getattr(arguments, name) is not None:
            raise ConfigError(f"{flag(name)}: not {where}")


def _check_directories(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for a file that could not be written when all is measured."""
    for name in ("json", "calibrate"):
        path: Path | None = getattr(arguments, name)
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{flag(name)}: {path.parent} is no directory")


def _targets(arguments: argparse.Namespace, stack: ExitStack, **client: int) -> dict[str, Target]:
    """The targets by name, which the stack closes; `client`: settings of a server's client."""
    make: dict[str, Callable[[], Target]] = {
        "grpc": lambda: ServerTarget(arguments.grpc_url or DEFAULT_URLS["grpc"], "grpc", **client),
        "http": lambda: ServerTarget(arguments.http_url or DEFAULT_URLS["http"], "http", **client),
        "infer": lambda: InferTarget(arguments.grpc_url or DEFAULT_URLS["grpc"]),
        "in-process": lambda: InProcessTarget(arguments.model),
    }
    return {name: stack.enter_context(closing(make[name]())) for name in arguments.target or ["grpc"]}


def _calibrate(arguments: argparse.Namespace) -> int:
    from fastserve.benchmark.calibration import calibrate  # which loads torch

    model = calibrate(arguments.model, arguments.seed)
    model.save(arguments.calibrate)
    Console().print(
        f"{arguments.calibrate}: {model.num_steps} points, R^2 {model.r_squared:.4f}, median relative error "
        f"{model.median_relative_error:.1%}; KV blocks are copied at "
        f"{model.copy_bytes_per_second / 1e9:.2f} GB/s",
        soft_wrap=True,
    )
    return 0
