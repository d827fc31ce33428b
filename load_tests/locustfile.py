"""Load on a running server: streams over gRPC and over HTTP, of mixed priorities and lengths.

    locust --config load_tests/locust.conf [--host http://127.0.0.1:8000] [--grpc-host 127.0.0.1:8001]

runs one minute and leaves `load_tests/report.html`. Users, half of each protocol (or name one: `GrpcUser`),
keep one request each in flight; with `--mode poisson --rate R` they start R requests a second in all, at
random, however long the server takes.

The report has, in milliseconds, the time to the first token (TTFT) of each priority, and for each priority
and protocol the time between tokens (ITL: between responses, divided by the tokens of the later one) and to
the end (E2E, where failures count).
"""

from __future__ import annotations

import math
import random
import time
from argparse import Namespace
from typing import Any, ClassVar
from urllib.parse import urlsplit

import grpc.experimental.gevent
from gevent.pool import Group
from locust import User, events, task
from locust.argument_parser import LocustArgumentParser

from fastserve_client import Client, FastServeError
from fastserve_client.client import Protocol

grpc.experimental.gevent.init_gevent()

PRIORITIES = (0, 5, 10)
WORDS = [
    "river",
    "stone",
    "light",
    "garden",
    "winter",
    "music",
    "paper",
    "window",
    "morning",
    "story",
    "table",
    "forest",
    "letter",
    "bridge",
    "summer",
    "mountain",
    "street",
    "ocean",
    "silver",
    "market",
    "teacher",
    "captain",
    "island",
    "engine",
    "picture",
    "village",
]


@events.init_command_line_parser.add_listener
def add_options(parser: LocustArgumentParser) -> None:
    parser.add_argument("--grpc-host", default="127.0.0.1:8001", help="host:port of the gRPC endpoint")
    parser.add_argument("--mode", choices=["closed", "poisson"], default="closed", help="how requests arrive")
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second of all users (poisson)")


def log_normal(mean: float, low: int, high: int) -> int:
    """A length from a log-normal distribution of that mean, then clipped to low..high."""
    sigma = 0.7
    return min(max(round(random.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)), low), high)


class StreamingUser(User):
    """Asks, reads the stream and reports."""

    abstract = True
    host = "http://127.0.0.1:8000"
    protocol: ClassVar[Protocol]

    def on_start(self) -> None:
        url = {"grpc": self.options.grpc_host, "http": urlsplit(self.host).netloc}[self.protocol]
        self.client = Client(url, self.protocol, retries=0)
        self.in_flight = Group()

    def on_stop(self) -> None:
        self.in_flight.kill()
        self.client.close()

    @property
    def options(self) -> Namespace:
        return self.environment.parsed_options

    def wait_time(self) -> float:
        """Seconds to the next task: the arrivals of all users together are a Poisson process of `--rate`."""
        if self.options.mode == "closed":
            return 0.0
        return random.expovariate(self.options.rate / self.environment.runner.target_user_count)

    @task
    def arrive(self) -> None:
        if self.options.mode == "closed":
            self.ask()
        else:
            self.in_flight.spawn(self.ask)

    def ask(self) -> None:
        priority = random.choice(PRIORITIES)
        prompt = " ".join(random.choices(WORDS, k=log_normal(160, 16, 512)))
        max_tokens = log_normal(120, 8, 256)
        name = f"priority {priority}, {self.protocol}"
        start = last = time.perf_counter()
        num_tokens = 0
        error: FastServeError | None = None
        try:
            with self.client.stream(
                prompt, max_tokens=max_tokens, ignore_eos=True, priority=priority
            ) as stream:
                for chunk in stream:
                    now = time.perf_counter()
                    if num_tokens == 0:
                        self.report("TTFT", f"priority {priority}", now - start)
                    elif chunk.num_output_tokens:
                        self.report("ITL", name, (now - last) / chunk.num_output_tokens)
                    num_tokens += chunk.num_output_tokens
                    last = now
            if num_tokens != max_tokens:
                error = FastServeError("INTERNAL", f"{num_tokens} tokens came, {max_tokens} were asked for")
        except FastServeError as failure:
            error = failure
        self.report("E2E", name, time.perf_counter() - start, num_tokens, error)

    def report(
        self, kind: str, name: str, seconds: float, num_tokens: int = 0, error: Exception | None = None
    ) -> None:
        measured: dict[str, Any] = {"response_time": seconds * 1e3, "response_length": num_tokens}
        self.environment.events.request.fire(
            request_type=kind, name=name, exception=error, context={}, **measured
        )


class GrpcUser(StreamingUser):
    protocol: ClassVar[Protocol] = "grpc"


class HttpUser(StreamingUser):
    protocol: ClassVar[Protocol] = "http"
