"""How `tritonserver` is started: its command line and its environment."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fastserve.config import CONFIG_VARIABLE
from fastserve.triton_server.installation import Installation
from fastserve.triton_server.start_checks import Ports

CONTROL_VARIABLE = "FASTSERVE_MODEL_CONTROL"
"""Tells the models that they may load and unload one another."""
SHARED_MEMORY_PER_MODEL = 4 << 20
"""Bytes that a stub and the server share at first, and by which that grows."""
SHARED_MEMORY_REGIONS = 2
"""Per model, as what must be free at the start: room to grow once."""


@dataclass(frozen=True)
class ServerOptions:
    """How the server is started, besides the settings of the engine."""

    host: str = "127.0.0.1"
    ports: Ports = field(default_factory=Ports)
    model_repository: Path | None = None
    """None: FastServe's own."""
    tritonserver: str = ""
    """A program, or `embedded`; empty: found by `server_installation`."""
    log_verbose: int = 0
    """Triton server's own; above 0, all of its log goes to the terminal."""
    exit_timeout_seconds: int = 30
    """For requests in flight, when the server is asked to stop."""


def command_line(
    installation: Installation, options: ServerOptions, repository: Path, shared_memory_prefix: str
) -> list[str]:
    """The command. All models of `repository` are loaded; the server ends when one of them cannot be."""
    values: dict[str, object] = {
        "model-repository": repository,
        **installation.directories,
        # Explicit: a model of ours may unload another, by which it says that the server is not ready.
        "model-control-mode": "explicit",
        "load-model": "*",
        "disable-auto-complete-config": None,
        "exit-timeout-secs": options.exit_timeout_seconds,
        "http-address": options.host,
        "grpc-address": options.host,
        "metrics-address": options.host,
        "http-port": options.ports.http,
        "grpc-port": options.ports.grpc,
        "metrics-port": options.ports.metrics,
        "log-verbose": options.log_verbose,
    }
    python_backend = {
        "shm-region-prefix-name": shared_memory_prefix,
        "shm-default-byte-size": SHARED_MEMORY_PER_MODEL,
        "shm-growth-byte-size": SHARED_MEMORY_PER_MODEL,
    }
    flags = [f"--{name}" if value is None else f"--{name}={value}" for name, value in values.items()]
    backend_flags = [f"--backend-config=python,{name}={value}" for name, value in python_backend.items()]
    return [str(installation.executable), *flags, *backend_flags]


def environment(installation: Installation, config_file: Path) -> dict[str, str]:
    """The environment of the server and so of its models."""
    return installation.environment() | {CONFIG_VARIABLE: str(config_file), CONTROL_VARIABLE: "explicit"}
