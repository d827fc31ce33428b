"""A stopped server loses nothing it has accepted; two behind HAProxy are restarted without a failure."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.e2e.conftest import START_SECONDS, Launch, RunningServer, free_ports

from fastserve.checkpoints.model_files import ModelFiles
from fastserve.config import Config
from fastserve.launcher.command_line import ServerOptions
from fastserve.launcher.launcher import Server
from fastserve.launcher.start_checks import Ports
from fastserve_client import Client, FastServeError

STREAMS, QUEUED = 32, 100
DRAIN_SECONDS = 120
HAPROXY = """
defaults
    mode http
    timeout connect 1s
    timeout client 120s
    timeout server 120s
    retries 3
    option redispatch
frontend openai
    bind {address}
    default_backend fastserve
backend fastserve
    balance leastconn
    option httpchk GET /v2/health/ready
    retry-on conn-failure empty-response 503
"""


class Load:
    """Requests through gRPC that come at once, each of so many tokens, and how each has ended."""

    def __init__(self, server: RunningServer, count: int, num_tokens: int) -> None:
        self.num_tokens: list[int] = []
        self.errors: list[Exception] = []
        self._client = Client(server.grpc_url, retries=0)
        self._options: Any = {"max_tokens": num_tokens, "ignore_eos": True, "timeout": 300.0}
        self._threads = [threading.Thread(target=self._read, args=(number,)) for number in range(count)]
        for thread in self._threads:
            thread.start()

    def _read(self, number: int) -> None:
        try:
            chunks = list(self._client.stream(f"Story number {number}:", **self._options))
            self.num_tokens.append(sum(chunk.num_output_tokens for chunk in chunks))
        except FastServeError as error:
            self.errors.append(error)

    def join(self) -> None:
        """Until each has ended."""
        for thread in self._threads:
            thread.join()
        self._client.close()


def test_a_stopped_server_finishes_what_runs_and_what_waits(launch: Launch, soak: bool) -> None:
    streams, queued, num_tokens = (STREAMS, QUEUED, 200) if soak else (4, 8, 60)
    with launch(max_num_seqs=streams, exit_timeout_seconds=DRAIN_SECONDS) as server:
        load = Load(server, streams + queued, num_tokens)
        waiting = 'fastserve_requests_waiting{priority="0"}'
        server.wait_for_metrics(lambda found: found.get(waiting, 0.0) == queued, 60.0)
        stopping = threading.Thread(target=server.launcher.stop)
        stopping.start()
        while not (server.launcher.run_directory.path / "stopping").exists():
            time.sleep(0.001)
        with Client(server.grpc_url, retries=0) as late:
            start = time.monotonic()
            with pytest.raises(FastServeError, match="UNAVAILABLE: the server is stopping"):
                late.generate("Hi", max_tokens=1)
            assert time.monotonic() - start < 2.0
        load.join()
        stopping.join()
    assert load.errors == []
    assert load.num_tokens == [num_tokens] * (streams + queued)


class Clients:
    """Streams of OpenAI's API one after the other, begun again only where nothing had come of them."""

    def __init__(self, url: str, count: int) -> None:
        self.failures: list[str] = []
        self.num_answers = self.num_retries = 0
        self._client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        while not self._stopping.is_set():
            self._answer(f"Story {number} of {self.num_answers}:")

    def _answer(self, prompt: str) -> None:
        options: Any = {"model": "fastserve", "max_tokens": 40, "extra_body": {"ignore_eos": True}}
        has_begun, give_up = False, time.monotonic() + 30.0
        while True:
            try:
                text, reason = "", None
                for chunk in self._client.completions.create(prompt=prompt, stream=True, **options):
                    has_begun = True
                    text += chunk.choices[0].text
                    reason = chunk.choices[0].finish_reason
                with self._lock:
                    self.num_answers += 1
                    if reason != "length":
                        self.failures.append(f"ended with {reason} after {text!r}")
                return
            except openai.OpenAIError as error:
                with self._lock:
                    self.num_retries += 1
                    if has_begun or time.monotonic() > give_up:
                        self.failures.append(repr(error))
                        return
                self._stopping.wait(0.05)

    def stop(self) -> None:
        """Until the last answers have come."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        self._client.close()


@contextlib.contextmanager
def haproxy(directory: Path, servers: list[Ports]) -> Iterator[str]:
    """HAProxy in front of OpenAI's ports; the base URL of the API."""
    address = f"127.0.0.1:{free_ports(1)[0]}"
    lines = [
        f"    server s{number} 127.0.0.1:{ports.openai} check port {ports.http} inter 200ms fall 1 rise 1"
        for number, ports in enumerate(servers)
    ]
    config = directory / "haproxy.cfg"
    config.write_text(HAPROXY.format(address=address) + "\n".join(lines) + "\n")
    process = subprocess.Popen(["haproxy", "-f", str(config), "-db"])
    try:
        yield f"http://{address}/v1"
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed")
@pytest.mark.timeout(600)
def test_two_behind_haproxy_are_restarted_one_after_the_other_without_a_failure(
    default_model: ModelFiles, tmp_path: Path, soak: bool
) -> None:
    if not soak:
        pytest.skip("a minute: run with --soak")
    all_ports = [Ports(*free_ports(4)) for _ in range(2)]
    config = Config(model=str(default_model.checkpoint), kv_cache_bytes=1 << 28)

    def start(ports: Ports) -> Server:
        """A server on these ports, ready."""
        server = Server(config, ServerOptions(ports=ports, exit_timeout_seconds=DRAIN_SECONDS))
        server.__enter__()
        server.wait_ready(START_SECONDS)
        return server

    servers = [start(ports) for ports in all_ports]
    try:
        with haproxy(tmp_path, all_ports) as url:
            clients = Clients(url, 16)
            for number, ports in enumerate(all_ports):
                before = clients.num_answers
                while clients.num_answers < before + 50:
                    time.sleep(0.05)
                servers[number].stop()
                servers[number] = start(ports)
            before = clients.num_answers
            while clients.num_answers < before + 50:
                time.sleep(0.05)
            clients.stop()
    finally:
        for server in servers:
            server.stop()
    print(f"{clients.num_answers} answers, {clients.num_retries} begun again, failures: {clients.failures}")
    assert clients.failures == []
