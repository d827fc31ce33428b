"""Half an hour of everything at once, in a container's 64 MB of shared memory, workers killed meanwhile.

No request hangs, no thread and no process is lost, no block stays held, nothing grows, and the server then
leaves at once. Only with --soak; FASTSERVE_SOAK_SECONDS and FASTSERVE_SOAK_KILL_SECONDS make it another.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from fastserve.launcher.server_process import model_of
from fastserve_client import Client, FastServeError

from .conftest import RunningServer, free_ports, is_idle

SECONDS = float(os.environ.get("FASTSERVE_SOAK_SECONDS", "1800"))
KILL_EVERY_SECONDS = float(os.environ.get("FASTSERVE_SOAK_KILL_SECONDS", "120"))
WARM_UP_SECONDS = SECONDS / 6
ANSWER_SECONDS = 110
"""A request that takes longer has hung: the whole load is some seconds' work."""
EXIT_SECONDS = 15
"""Half of what a server takes that believes a request to be in flight."""
CLIENTS = 12
GROWTH = 1.05
SAMPLE_SECONDS = 10
SAMPLES = 30
"""Of each process's size, from the warm-up's end and before the end. One alone says nothing: what the server
holds goes up and down by an eighth within a minute, with the answers that are under way."""
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}
WORDS = ["river", "stone", "seven", "blue", "engine", "was", "the"]
EXPECTED_CODES = {"UNAVAILABLE", "CANCELLED"}
"""Of requests that a killed worker had or that found shared memory full, and of those cancelled."""


@dataclass
class Chunks:
    """What a client has seen of its present request's stream."""

    start: float = field(default_factory=time.monotonic)
    count: int = 0
    last: float = 0.0

    def note(self) -> None:
        self.count, self.last = self.count + 1, time.monotonic()

    def __str__(self) -> str:
        now = time.monotonic()
        last = f", the last {now - self.last:.1f} s ago" if self.count else ""
        return f"({now - self.start:.1f} s after its start; {self.count} chunks{last})"


@dataclass
class Traffic:
    """What the clients have seen."""

    outcomes: Counter[str] = field(default_factory=Counter)
    sentences: Counter[str] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, kind: str, outcome: str) -> None:
        with self.lock:
            self.outcomes[f"{kind}: {outcome}"] += 1

    def note_error(self, kind: str, protocol: str, error: Exception, chunks: Chunks) -> None:
        code = getattr(error, "code", type(error).__name__)
        self.note(kind, code)
        with self.lock:
            self.sentences[str(error)[:120]] += 1
            if code not in EXPECTED_CODES:
                self.unexpected.append(f"{kind} over {protocol}: {type(error).__name__}: {error} {chunks}")


def words(count: int, rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(count))


def long_prompt(client: Client, rng: random.Random, chunks: Chunks) -> None:
    client.generate(words(1200, rng), max_tokens=20, timeout=ANSWER_SECONDS)


def prompt_logprobs(client: Client, rng: random.Random, chunks: Chunks) -> None:
    client.generate(words(900, rng), max_tokens=4, prompt_logprobs=20, timeout=ANSWER_SECONDS)


def guided(client: Client, rng: random.Random, chunks: Chunks) -> None:
    client.generate(
        words(20, rng), max_tokens=60, structured_outputs={"json": SCHEMA}, timeout=ANSWER_SECONDS
    )


def cancelled(client: Client, rng: random.Random, chunks: Chunks) -> None:
    with client.stream(words(30, rng), max_tokens=1500, ignore_eos=True, timeout=ANSWER_SECONDS) as stream:
        for _ in stream:
            chunks.note()
            if chunks.count == 4:
                return


def slow_reader(client: Client, rng: random.Random, chunks: Chunks) -> None:
    with client.stream(words(30, rng), max_tokens=120, ignore_eos=True, timeout=ANSWER_SECONDS) as stream:
        for _ in stream:
            chunks.note()
            time.sleep(0.3)  # the reader is slow: nothing is waited for here


def several(client: Client, rng: random.Random, chunks: Chunks) -> None:
    client.generate(words(50, rng), n=4, max_tokens=30, seed=rng.randrange(1000), timeout=ANSWER_SECONDS)


def short(client: Client, rng: random.Random, chunks: Chunks) -> None:
    client.generate(words(10, rng), max_tokens=16, priority=rng.choice([0, 5, 10]), timeout=ANSWER_SECONDS)


KINDS: list[Callable[[Client, random.Random, Chunks], None]] = [
    long_prompt,
    prompt_logprobs,
    guided,
    cancelled,
    slow_reader,
    several,
    short,
]


def serve_clients(url: str, protocol: Any, seed: int, until: float, traffic: Traffic) -> None:
    """One request after another, of all kinds, until the time is over."""
    rng = random.Random(seed)
    with Client(url, protocol, retries=0) as client:
        while time.monotonic() < until:
            kind = rng.choice(KINDS)
            chunks = Chunks()
            try:
                kind(client, rng, chunks)
            except Exception as error:
                traffic.note_error(kind.__name__, protocol, error, chunks)
                if isinstance(error, FastServeError):
                    time.sleep(0.2)  # as a client does that is refused
            else:
                traffic.note(kind.__name__, "answered")


@contextmanager
def small_shared_memory_server(log: Path) -> Iterator[tuple[RunningServer, subprocess.Popen[bytes]]]:
    """`fastserve serve` in a mount namespace of its own, where /dev/shm has 64 MB."""
    ports = free_ports(3)
    serve = (
        f"{Path(sys.executable).parent / 'fastserve'} serve --http-port {ports[0]} --grpc-port {ports[1]}"
        f" --metrics-port {ports[2]} --max-num-seqs 16"
    )
    command = ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs -o size=64m tmpfs /dev/shm && exec {serve}"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    addresses = [f"127.0.0.1:{port}" for port in ports]
    server = RunningServer(None, *addresses)  # type: ignore[arg-type]  # it is a program here, not an object
    try:
        with Client(addresses[0], "http") as client:  # Triton server opens this port after that of gRPC
            wait_until(lambda: client.is_ready(2), 120, f"ready; its output: {log}")
        yield server, process
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def wait_until(holds: Callable[[], bool], seconds: float, what: str) -> None:
    give_up = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < give_up, f"not {what} after {seconds} s"
        time.sleep(0.1)


def spawned(process: psutil.Process) -> bool:
    """Whether `multiprocessing` has spawned it to do work."""
    return "spawn_main" in " ".join(process.cmdline())


def worker_of(launcher: psutil.Process) -> psutil.Process | None:
    """The process that runs the model: the one that the stub of `engine` has spawned."""
    for stub in launcher.children(recursive=True):
        if model_of(stub) == "engine":
            return next((child for child in stub.children() if spawned(child)), None)
    return None


def processes(launcher: psutil.Process) -> dict[str, tuple[int, int]]:
    """Of the launcher, the server and its stubs: bytes that are theirs alone, and the number of threads.

    Not the worker, which is killed; nor those that try out guides, which come and go.
    """
    found = {}
    for child in [launcher, *launcher.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            command = child.cmdline()
            if spawned(child) or "resource_tracker" in " ".join(command):
                continue
            size = child.memory_full_info().uss
            found[f"{child.pid} {model_of(child) or Path(command[0]).name}"] = (size, child.num_threads())
    return found


def median_of(samples: list[dict[str, tuple[int, int]]]) -> dict[str, tuple[int, int]]:
    """Of each process the median size and number of threads. Fails if there were others at some time."""
    names = samples[0].keys()
    assert all(each.keys() == names for each in samples), "a process was lost or replaced"
    return {
        name: (
            int(statistics.median(each[name][0] for each in samples)),
            int(statistics.median(each[name][1] for each in samples)),
        )
        for name in names
    }


def in_mb(found: dict[str, tuple[int, int]]) -> dict[str, str]:
    return {name: f"{size / 1e6:.1f} MB, {threads} threads" for name, (size, threads) in found.items()}


@pytest.mark.timeout(SECONDS + 600)
def test_everything_at_once_for_half_an_hour(soak: bool, tmp_path: Path) -> None:
    if not soak:
        pytest.skip("half an hour: only with --soak")
    if shutil.which("unshare") is None or subprocess.run(["unshare", "--mount", "true"]).returncode:
        pytest.skip("a mount namespace of one's own is not allowed here")
    log = tmp_path / "serve.log"
    with small_shared_memory_server(log) as (server, process):
        launcher = psutil.Process(process.pid)
        traffic = Traffic()
        start = time.monotonic()
        urls = [(server.grpc_url, "grpc"), (server.http_url, "http")]
        clients = [
            threading.Thread(
                target=serve_clients,
                args=(*urls[seed % 2], seed, start + SECONDS, traffic),
                name=f"client-{seed}",
                daemon=True,
            )
            for seed in range(CLIENTS)
        ]
        for each in clients:
            each.start()
        kills, worker_sizes = 0, []
        next_kill = start + KILL_EVERY_SECONDS
        samples: list[dict[str, tuple[int, int]]] = []
        next_sample = start + WARM_UP_SECONDS
        while time.monotonic() < start + SECONDS:
            time.sleep(1)  # the clock of the test itself
            if time.monotonic() > next_sample:
                samples.append(processes(launcher))
                next_sample += SAMPLE_SECONDS
            if time.monotonic() > next_kill and (worker := worker_of(launcher)) is not None:
                worker_sizes.append(worker.memory_info().rss)
                worker.kill()
                kills, next_kill = kills + 1, next_kill + KILL_EVERY_SECONDS
        for each in clients:
            each.join(ANSWER_SECONDS + 30)
        hung = [each.name for each in clients if each.is_alive()]
        samples.append(processes(launcher))
        count = min(SAMPLES, len(samples) // 2)
        early, late = median_of(samples[:count]), median_of(samples[-count:])
        print(f"{kills} workers killed; {dict(sorted(traffic.outcomes.items()))}")
        print(f"errors: {dict(traffic.sentences.most_common(12))}")
        print(f"worker's size at each kill, MB: {[size // 1_000_000 for size in worker_sizes]}")
        print(f"after {WARM_UP_SECONDS:.0f} s: {in_mb(early)}\nat the end: {in_mb(late)}")
        assert not hung, f"requests that hang: {hung}"
        server.wait_until_idle(30)
        assert not traffic.unexpected, traffic.unexpected[:10]
        assert kills >= SECONDS // KILL_EVERY_SECONDS - 1
        assert early.keys() == late.keys(), "a process was lost or replaced"
        for name, (size, threads) in early.items():
            assert late[name][0] <= size * GROWTH + (1 << 20), f"{name} grew: {size} -> {late[name][0]} bytes"
            assert late[name][1] >= threads - 1, f"{name} lost threads: {threads} -> {late[name][1]}"
        assert is_idle(server.metrics())
        process.terminate()
        process.wait(EXIT_SECONDS)
