"""`fastserve bench`: load on a server, on the engine inside this process, or on both in turn.

Peers are measured beside them (`--peer`). Closed loop: clients that each send a request when their last one
has ended. Open loop: requests that come when a trace or a distribution says so. Calibration: the seconds of
the engine's steps. Profile: where those go.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

from rich.console import Console

from fastserve.atomic_write import WriteError
from fastserve.benchmark.peers import PeerError, open_peer
from fastserve.benchmark.server_calibration import CalibrationError, calibrate_server, read_step_totals
from fastserve.benchmark.targets import InferTarget, InProcessTarget, ServerTarget, Target
from fastserve.checkpoints.model_error import ModelError
from fastserve.commands import closed_loop, open_loop, profile
from fastserve.commands.workload_options import (
    LENGTH_OPTIONS,
    add_length_arguments,
    arrivals_of,
    has_arrivals,
)
from fastserve.config import ConfigError
from fastserve.config_flags import flag
from fastserve.errors import RequestError
from fastserve.simulation.step_time import StepTimeError, StepTimeModel
from fastserve.workload.trace import TraceError
from fastserve_client import FastServeError

ERRORS = (
    CalibrationError,
    FastServeError,
    ModelError,
    PeerError,
    RequestError,
    StepTimeError,
    TraceError,
    WriteError,
)
DEFAULT_METRICS_URL = "127.0.0.1:8002"
DEFAULT_URLS = {"grpc": "127.0.0.1:8001", "http": "127.0.0.1:8000"}
LOAD = ("peer", "json", *closed_loop.OPTIONS, *open_loop.OPTIONS)
"""Those that a calibration does not read."""
CALIBRATED = ("requests", *LENGTH_OPTIONS)
"""Those of load that a calibration has numbers of its own for."""


NOT_PROFILED = (
    *(name for name in (*LOAD, *CALIBRATED) if name != "clients"),
    *("target", "calibrate", "metrics_url", *(f"{name}_url" for name in DEFAULT_URLS)),
)
"""Those that a profile does not read."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The targets, and the load on them."""
    parser.add_argument(
        "--target",
        nargs="+",
        choices=("grpc", "http", "infer", "in-process"),
        help="measured in turn (default: grpc); infer: `fastserve_infer` over gRPC, with one response",
    )
    parser.add_argument(
        "--peer",
        action="append",
        metavar="NAME=URL|COMMAND",
        help="measured beside the targets: a server of OpenAI's API (http://...), or a command that serves a "
        "library (see examples/peers); may be given again",
    )
    for name, url in DEFAULT_URLS.items():
        parser.add_argument(f"--{name}-url", help=f"(default: {url})")
    parser.add_argument("--model", default="", help="for in-process (default: the default model)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all figures are written")
    add_length_arguments(parser)
    closed_loop.add_arguments(parser.add_argument_group("closed loop"))
    open_loop.add_arguments(parser.add_argument_group("open loop, with --trace, --poisson or --gamma"))
    parser.add_argument_group("calibration").add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="in place of load: measure the engine's steps inside this process, and write how long they "
        "take; with --target grpc: read FILE, and replace them by those of a server that nobody else uses",
    )
    parser.add_argument_group("profile").add_argument(
        "--profile",
        type=int,
        nargs="?",
        const=profile.CONTEXT_LEN,
        metavar="TOKENS",
        help="in place of load: where the time of a decode step inside this process goes, beside the floor; "
        f"of --clients sequences, of so many tokens each (default: {profile.CONTEXT_LEN})",
    )
    parser.add_argument("--metrics-url", help=f"to calibrate a server (default: {DEFAULT_METRICS_URL})")


def run(arguments: argparse.Namespace) -> int:
    """Loads the targets in turn and prints a table. Raises ConfigError, and what is in ERRORS."""
    _check_directories(arguments)
    if arguments.profile is not None:
        _refuse(arguments, NOT_PROFILED, "with --profile")
        closed_loop.check(arguments)
        return profile.run(arguments)
    if arguments.calibrate is None:
        _refuse(arguments, ("metrics_url",), "without --calibrate")
    else:
        _refuse(arguments, (*LOAD, *CALIBRATED), "with --calibrate")
        if not arguments.target:
            _refuse(arguments, ("grpc_url", "http_url", "metrics_url"), "without --target")
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
    for name in ("json", "calibrate", "plot"):
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
    targets = {name: stack.enter_context(closing(make[name]())) for name in arguments.target or ["grpc"]}
    for peer in arguments.peer or ():
        name, equals, address = peer.partition("=")
        if not (name and equals and address):
            raise ConfigError(f"--peer: got {peer!r}; allowed: NAME=URL or NAME=COMMAND")
        if name in targets:
            raise ConfigError(f"--peer: {name} is there already; allowed: another name")
        targets[name] = stack.enter_context(closing(open_peer(address)))
    return targets


def _calibrated_server(arguments: argparse.Namespace) -> StepTimeModel:
    if arguments.target != ["grpc"]:
        raise ConfigError(
            f"--target: got {' '.join(arguments.target)}; allowed with --calibrate: grpc, or none"
        )
    url = arguments.metrics_url or DEFAULT_METRICS_URL
    with ExitStack() as stack:
        [target] = _targets(arguments, stack).values()
        model = StepTimeModel.load(arguments.calibrate)
        try:
            model = calibrate_server(target, lambda: read_step_totals(url), model, arguments.seed)
        except OSError as error:
            raise CalibrationError(f"--metrics-url: {url}: {error}") from error
    return model


def _calibrated_engine(arguments: argparse.Namespace) -> StepTimeModel:
    from fastserve.benchmark.calibration import calibrate  # which loads torch

    return calibrate(arguments.model, arguments.seed)


def _calibrate(arguments: argparse.Namespace) -> int:
    """Raises WriteError, and what measuring raises."""
    model = _calibrated_server(arguments) if arguments.target else _calibrated_engine(arguments)
    model.save(arguments.calibrate)
    Console().print(
        f"{arguments.calibrate}: {model.num_steps} points, R^2 {model.r_squared:.4f}, median relative error "
        f"{model.median_relative_error:.1%}; KV blocks are copied at "
        f"{model.copy_bytes_per_second / 1e9:.2f} GB/s",
        soft_wrap=True,
    )
    return 0
