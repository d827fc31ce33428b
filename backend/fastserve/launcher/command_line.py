"""How `tritonserver` is started: its command line and its environment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastserve.config import CONFIG_VARIABLE, MODEL_CONTROL_VARIABLE, STOPPING_VARIABLE
from fastserve.encoders.served_encoder import ServedEncoder
from fastserve.launcher.closed_apis import SET_WITH_KEYS, key_flags
from fastserve.launcher.installation import Installation
from fastserve.launcher.run_directory import RunDirectory
from fastserve.launcher.start_checks import Ports, in_url
from fastserve.launcher.tls import TlsFiles
from fastserve.start_error import StartError

SHARED_MEMORY_PER_MODEL = 4 << 20
"""Bytes that a stub and the server share at first, and by which that grows."""
EXIT_SECONDS = 1
"""For a server that has nothing in flight to leave, although connections are open."""
PREFIX_SETTING = "python,shm-"
SET_BY_FASTSERVE = {
    "model-repository": "use --model-repository before the `--`",
    "model-store": "use --model-repository before the `--`",
    "http-address": "use --host before the `--`",
    "grpc-address": "use --host before the `--`",
    "metrics-address": "use --host before the `--`",
    "http-port": "use --http-port before the `--`",
    "grpc-port": "use --grpc-port before the `--`",
    "metrics-port": "use --metrics-port before the `--`",
    "grpc-use-ssl": "use --tls-cert and --tls-key before the `--`",
    "grpc-server-cert": "use --tls-cert before the `--`",
    "grpc-server-key": "use --tls-key before the `--`",
    "grpc-root-cert": "use --tls-client-ca before the `--`",
    "log-verbose": "use --log-verbose before the `--`",
    "exit-timeout-secs": "use --exit-timeout-secs before the `--`",
    "backend-directory": "name another server with --tritonserver before the `--`",
    "cache-directory": "name another server with --tritonserver before the `--`",
    "log-file": "the log's path is printed at the start",
    "allow-http": "FastServe asks the server's state over HTTP",
    "allow-metrics": "its gauges say when nothing is in flight",
    "model-control-mode": "it must be explicit",
    "load-model": "all models are loaded",
    "disable-auto-complete-config": "the models' configurations are complete",
    "exit-on-error": "a server that cannot load a model ends",
}
"""Flags of `tritonserver` by their names, and what to do in place of giving one."""
SHARED_MEMORY_REGIONS = 2
"""Per model, as what must be free at the start: room to grow once."""


@dataclass(frozen=True)
class ServerOptions:
    """How the server is started, besides the settings of the engine."""

    host: str = "127.0.0.1"
    ports: Ports = field(default_factory=Ports)
    metrics_host: str = ""
    """Of the metrics port alone; empty: `host`."""
    tls: TlsFiles | None = None
    """Of the HTTP and the gRPC port; None: they are not encrypted."""
    model_repository: Path | None = None
    """None: FastServe's own."""
    tritonserver: str = ""
    """A program, or `embedded`; empty: found by `server_installation`."""
    log_verbose: int = 0
    """Triton server's own; above 0, all of its log goes to the terminal."""
    served_model_name: str = "fastserve"
    """What requests to OpenAI's API call the model."""
    exit_timeout_seconds: int = 30
    """For requests in flight, when the server is asked to stop."""
    encoders: tuple[ServedEncoder, ...] = ()
    """Models that embed, classify or rerank."""
    encoders_only: bool = False
    """No other models are served: `model_repository` is not."""
    server_flags: tuple[str, ...] = ()
    """Further words of `tritonserver`'s command line; see `check_server_flags`."""


@dataclass(frozen=True)
class Addresses:
    """Where `tritonserver` listens, in numbers."""

    http: str
    grpc: str
    metrics: str
    http_port: int


def check_server_flags(words: Sequence[str], with_keys: bool = False) -> None:
    """Raises StartError for a flag of `tritonserver` that FastServe sets itself, and for what is no flag.

    `with_keys`: the server has a keys file.
    """
    if words and not words[0].startswith("--"):
        raise StartError(f"got {words[0]!r}: flags of tritonserver, each with its --, follow a `--`")
    for word in words:
        # The server takes the beginning of a flag for the whole, as getopt does.
        beginning = word.removeprefix("--").partition("=")[0]
        for name, instead in SET_BY_FASTSERVE.items():
            if word.startswith("--") and beginning and name.startswith(beginning):
                raise StartError(f"--{name} of tritonserver is set by FastServe: {instead}")
        for name, reason in SET_WITH_KEYS.items() if with_keys else ():
            if word.startswith("--") and beginning and name.startswith(beginning):
                raise StartError(f"--{name} of tritonserver: allowed without --keys-file only: {reason}")
        if PREFIX_SETTING in word:
            raise StartError(f"{PREFIX_SETTING}* of tritonserver is set by FastServe, to keep servers apart")


def command_line(
    installation: Installation,
    options: ServerOptions,
    addresses: Addresses,
    repositories: Sequence[Path],
    shared_memory_prefix: str,
    with_keys: bool = False,
) -> list[str]:
    """The command. All models of the repositories are loaded; the server ends when one of them cannot be.

    `with_keys`: the server has a keys file.
    """
    values: dict[str, object] = {
        **installation.directories,
        # Explicit: a model of ours may unload another, by which it says that the server is not ready.
        "model-control-mode": "explicit",
        "load-model": "*",
        "disable-auto-complete-config": None,
        # Nothing is in flight any more when the server is told to leave: see `Drain`.
        "exit-timeout-secs": EXIT_SECONDS,
        "http-address": _evhtp_address(addresses.http),
        "grpc-address": in_url(addresses.grpc),
        "metrics-address": _evhtp_address(addresses.metrics),
        "http-port": addresses.http_port,
        "grpc-port": options.ports.grpc,
        "metrics-port": options.ports.metrics,
        "log-verbose": options.log_verbose,
    }
    python_backend = {
        "shm-region-prefix-name": shared_memory_prefix,
        "shm-default-byte-size": SHARED_MEMORY_PER_MODEL,
        "shm-growth-byte-size": SHARED_MEMORY_PER_MODEL,
    }
    stored = [f"--model-repository={repository}" for repository in repositories]
    flags = [f"--{name}" if value is None else f"--{name}={value}" for name, value in values.items()]
    backend_flags = [f"--backend-config=python,{name}={value}" for name, value in python_backend.items()]
    if options.tls is not None:
        flags += options.tls.grpc_flags()
    if with_keys:
        flags += key_flags()
    return [str(installation.executable), *stored, *flags, *backend_flags, *options.server_flags]


def _evhtp_address(address: str) -> str:
    """As the HTTP library of the server wants it."""
    return f"ipv6:{address}" if ":" in address else address


def environment(
    installation: Installation, run: RunDirectory, config_file: Path, stopping_file: Path
) -> dict[str, str]:
    """The environment of the server and so of its models."""
    return installation.environment(run) | {
        CONFIG_VARIABLE: str(config_file),
        MODEL_CONTROL_VARIABLE: "explicit",
        STOPPING_VARIABLE: str(stopping_file),
    }
