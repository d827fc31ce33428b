"""Load on a running server's encoder: texts of mixed lengths, one request in flight for each user.

    locust --config load_tests/locust.conf --locustfile load_tests/encoders.py [--encoder embed] [--words 40]

`--encoder` names a served embedder; the report has the time to its answer, by protocol.
"""

from __future__ import annotations

import math
import random
import time
from typing import ClassVar
from urllib.parse import urlsplit

import grpc.experimental.gevent
from locust import User, events, task
from locust.argument_parser import LocustArgumentParser

from fastserve_client import Client, FastServeError
from fastserve_client.client import Protocol

grpc.experimental.gevent.init_gevent()

WORDS = ["river", "stone", "light", "garden", "winter", "music", "paper", "window", "morning", "story"]
SIGMA = 0.7
"""Of the log-normal lengths."""


@events.init_command_line_parser.add_listener
def add_options(parser: LocustArgumentParser) -> None:
    parser.add_argument("--grpc-host", default="127.0.0.1:8001", help="host:port of the gRPC endpoint")
    parser.add_argument("--encoder", default="embed", help="the model's name on the server")
    parser.add_argument("--words", type=float, default=40, help="of a text, on average (log-normal)")


class EmbeddingUser(User):
    """Sends a text, waits for its embedding and reports."""

    abstract = True
    host = "http://127.0.0.1:8000"
    protocol: ClassVar[Protocol]

    def on_start(self) -> None:
        options = self.environment.parsed_options
        url = {"grpc": options.grpc_host, "http": urlsplit(self.host).netloc}[self.protocol]
        self.client = Client(url, self.protocol, retries=0)

    def on_stop(self) -> None:
        self.client.close()

    @task
    def embed(self) -> None:
        options = self.environment.parsed_options
        length = round(random.lognormvariate(math.log(options.words) - SIGMA**2 / 2, SIGMA))
        text = " ".join(random.choices(WORDS, k=max(1, length)))
        start = time.perf_counter()
        error: FastServeError | None = None
        try:
            self.client.embed([text], model=options.encoder, truncate=True)
        except FastServeError as failure:
            error = failure
        self.environment.events.request.fire(
            request_type="EMBED",
            name=self.protocol,
            response_time=(time.perf_counter() - start) * 1e3,
            response_length=1,
            exception=error,
            context={},
        )


class GrpcEmbeddingUser(EmbeddingUser):
    protocol: ClassVar[Protocol] = "grpc"


class HttpEmbeddingUser(EmbeddingUser):
    protocol: ClassVar[Protocol] = "http"
