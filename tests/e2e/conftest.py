"""A real Triton server with the default model, started once per run on free ports."""

from __future__ import annotations

import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from fastserve.checkpoints.model_files import ModelFiles
from fastserve.config import Config
from fastserve.encoders.served_encoder import ServedEncoder
from fastserve.launcher.command_line import ServerOptions
from fastserve.launcher.launcher import Server
from fastserve.launcher.start_checks import Ports
from fastserve.launcher.tls import TlsFiles

START_SECONDS = 120
MODEL_LABEL = re.compile(r'model="fastserve",?|,model="fastserve"(?=})')


@dataclass(frozen=True)
class RunningServer:
    """Where a server is, as host:port, and what its metrics say."""

    launcher: Server
    http_url: str
    grpc_url: str
    metrics_url: str
    openai_url: str | None = None
    """Base URL of OpenAI's API, where the server has it."""

    def metrics(self) -> dict[str, float]:
        """Every sample of FastServe's own metrics by its name with labels, as Prometheus reads them."""
        with urllib.request.urlopen(f"http://{self.metrics_url}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        samples = (line.rsplit(" ", 1) for line in lines if line.startswith("fastserve_"))
        return {MODEL_LABEL.sub("", name).replace("{}", ""): float(value) for name, value in samples}

    def wait_for_metrics_port(self, seconds: float) -> None:
        """Waits until the metrics can be read: Triton server opens their port last."""
        give_up = time.monotonic() + seconds
        while True:
            try:
                self.metrics()
                return
            except urllib.error.URLError:
                assert time.monotonic() < give_up, f"no metrics after {seconds} s"
                time.sleep(0.02)

    def wait_for_metrics(self, holds: Callable[[dict[str, float]], bool], seconds: float) -> float:
        """Waits until the metrics are so, and returns the seconds it took. Fails when it takes longer."""
        start = time.monotonic()
        while not holds(metrics := self.metrics()):
            assert time.monotonic() - start < seconds, f"not so after {seconds} s: {metrics}"
            time.sleep(0.02)
        return time.monotonic() - start

    def wait_until_idle(self, seconds: float) -> float:
        """Waits until no request runs or waits and no KV block is held; returns the seconds it took."""
        return self.wait_for_metrics(is_idle, seconds)


def is_idle(metrics: dict[str, float]) -> bool:
    """Whether nothing is being served."""
    names = (
        "fastserve_requests_running",
        "fastserve_requests_waiting",
        "fastserve_requests_preempted",
        "fastserve_kv_blocks_used",
    )
    return all(value == 0 for name, value in metrics.items() if name.startswith(names))


def fuzzing(max_examples: int) -> settings:
    """Hypothesis against a real server: the same examples each time, and none shrunk, as each is slow."""
    return settings(
        max_examples=max_examples,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def running(
    model: ModelFiles,
    exit_timeout_seconds: int = 5,
    model_repository: Path | None = None,
    encoders: tuple[ServedEncoder, ...] = (),
    encoders_only: bool = False,
    tls: TlsFiles | None = None,
    openai: bool = False,
    **settings: Any,
) -> Iterator[RunningServer]:
    """A server of its own with these settings. `openai`: with OpenAI's API."""
    ports = Ports(*free_ports(4)) if openai else Ports(*free_ports(3))
    options = ServerOptions(
        ports=ports,
        exit_timeout_seconds=exit_timeout_seconds,
        model_repository=model_repository,
        encoders=encoders,
        encoders_only=encoders_only,
        tls=tls,
    )
    with Server(Config(model=str(model.checkpoint), **settings), options) as launcher:
        launcher.wait_ready(START_SECONDS)
        urls = [f"127.0.0.1:{port}" for port in (ports.http, ports.grpc, ports.metrics)]
        server = RunningServer(launcher, *urls)
        if openai:
            server = replace(server, openai_url=f"http://127.0.0.1:{ports.openai}/v1")
        server.wait_for_metrics_port(START_SECONDS)
        yield server


Launch = Callable[..., AbstractContextManager[RunningServer]]


@pytest.fixture(scope="session")
def launch(default_model: ModelFiles) -> Launch:
    """Starts another server, with settings of its own: `with launch(max_num_seqs=1) as server`."""
    return partial(running, default_model)


@pytest.fixture(scope="session")
def server(launch: Launch) -> Iterator[RunningServer]:
    with launch(openai=True) as running_server:
        yield running_server
