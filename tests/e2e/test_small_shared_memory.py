"""A real server whose `/dev/shm` is full, as in a container that was given 64 MB and fills them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fastserve.checkpoints.model_files import ModelFiles
from fastserve_client import Client, FastServeError

from .conftest import free_ports

SIZE = 64 << 20
IN_A_SMALL_SHM = f"mount -t tmpfs -o size={SIZE} tmpfs /dev/shm && exec "
START_SECONDS = 120
REQUEST_SECONDS = 90.0
"""By when every request must have ended, one way or the other."""


def can_mount() -> bool:
    command = ["unshare", "-m", "sh", "-c", IN_A_SMALL_SHM + "true"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


@dataclass(frozen=True)
class SmallServer:
    """A server in a mount namespace of its own."""

    process: subprocess.Popen[bytes]
    http_url: str
    grpc_url: str

    @property
    def shared_memory(self) -> Path:
        return Path(f"/proc/{self.process.pid}/root/dev/shm")

    def free_bytes(self) -> int:
        state = os.statvfs(self.shared_memory)
        return state.f_bavail * state.f_frsize

    def fill(self, leave: int = 0) -> Path:
        """Takes what is free; the file to delete."""
        path = self.shared_memory / "filler"
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, self.free_bytes() - leave)
        return path

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.http_url}/v2/health/ready", timeout=2) as response:
                return response.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def wait_ready(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self.is_ready():
            assert self.process.poll() is None, "the server has ended"
            assert time.monotonic() < deadline, f"not ready after {seconds} s"
            time.sleep(0.1)


@pytest.fixture
def small_server(default_model: ModelFiles, soak: bool) -> Iterator[SmallServer]:
    if not soak:
        pytest.skip("takes minutes: --soak")
    if not can_mount():
        pytest.skip("needs to mount in a namespace of its own (unshare -m)")
    ports = free_ports(3)
    flags = [f"--{name}-port={port}" for name, port in zip(("http", "grpc", "metrics"), ports, strict=True)]
    program = str(Path(sys.executable).with_name("fastserve"))
    serve = [program, "serve", f"--model={default_model.checkpoint}", *flags, "--openai-port=0"]
    process = subprocess.Popen(["unshare", "-m", "sh", "-c", IN_A_SMALL_SHM + '"$@"', "sh", *serve])
    server = SmallServer(process, f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}")
    try:
        server.wait_ready(START_SECONDS)
        yield server
    finally:
        process.terminate()
        process.wait(60)


class Traffic:
    """Streams, whole answers and large ones, side by side, until told to stop; how each ended."""

    KINDS: tuple[dict[str, Any], ...] = (
        {"max_tokens": 60, "ignore_eos": True},
        {"max_tokens": 4, "prompt_logprobs": 20},
        {"max_tokens": 4, "prompt_logprobs": 20},
        {"max_tokens": 40, "logprobs": 20, "n": 4},
    )
    LONG = "A tale of ships. " * 700
    """Its log-probabilities fill more than the memory that a model shares with the server at first."""

    def __init__(self, server: SmallServer) -> None:
        self.answers = 0
        self.errors: list[FastServeError] = []
        self._server = server
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(6)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        with Client(self._server.grpc_url, retries=0) as client:
            while not self._stopping.is_set():
                options = self.KINDS[number % len(self.KINDS)]
                try:
                    prompt = self.LONG if "prompt_logprobs" in options else "A tale of ships."
                    client.stream(prompt, timeout=REQUEST_SECONDS, **options).read()
                    with self._lock:
                        self.answers += 1
                except FastServeError as error:
                    with self._lock:
                        self.errors.append(error)

    def stop(self) -> None:
        self._stopping.set()
        deadline = time.monotonic() + REQUEST_SECONDS + 5
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        assert not any(thread.is_alive() for thread in self._threads), "a request has not ended"


def test_no_request_hangs_while_shared_memory_is_full_and_all_is_well_after(
    small_server: SmallServer,
) -> None:
    filler = small_server.fill()
    traffic = Traffic(small_server)
    time.sleep(40.0)  # a load, not a wait for something
    regions = [(path.name, path.stat().st_size >> 20) for path in small_server.shared_memory.iterdir()]
    filler.unlink()
    time.sleep(10.0)
    traffic.stop()
    seen = [str(error) for error in traffic.errors]
    print(f"{traffic.answers} answers, {len(seen)} errors: {set(seen)}; MiB: {regions}")
    assert traffic.answers > 0
    assert not [error for error in traffic.errors if error.code == "DEADLINE_EXCEEDED"]
    assert any("memory" in error for error in seen), "the memory was not filled: nothing was tried"
    small_server.wait_ready(60)
    with Client(small_server.grpc_url, retries=0) as client:
        answer = client.generate("Hello", temperature=0, max_tokens=4, timeout=30)
    assert answer.num_output_tokens == 4
    small_server.process.terminate()
    small_server.process.wait(15)  # half of what it would wait for a request that it believes to be in flight
