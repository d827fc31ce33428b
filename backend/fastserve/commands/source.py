"""Where `generate` and `chat` get their text: a running server, or a model loaded into this process."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from fastserve.access.key import KEY_VARIABLE
from fastserve.checkpoints.model_error import ModelError
from fastserve.errors import RequestError
from fastserve_client import Client, FastServeError

SOURCE_ERRORS = (FastServeError, ModelError, RequestError)


class Source(Protocol):
    """Continues a text (str) or a chat (list of messages), piece by piece."""

    def stream(self, prompt: str | list[dict[str, str]], **sampling: Any) -> Iterator[str]:
        """The pieces as they come. Raises one of SOURCE_ERRORS."""


class _Server:
    def __init__(self, client: Client) -> None:
        self._client = client

    def stream(self, prompt: str | list[dict[str, str]], **sampling: Any) -> Iterator[str]:
        given: dict[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
        with self._client.stream(**given, **sampling) as chunks:
            for chunk in chunks:
                yield chunk.text


class _Embedded:
    def __init__(self, server: Any) -> None:
        self._server = server

    def stream(self, prompt: str | list[dict[str, str]], **sampling: Any) -> Iterator[str]:
        yield from self._server.submit(prompt, **sampling)


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that `open_source` reads."""
    parser.add_argument(
        "--url",
        help="gRPC address of a running server; without it the model is loaded here. One that asks for keys "
        f"gets that of the environment variable {KEY_VARIABLE}",
    )
    parser.add_argument(
        "--tls-ca", metavar="FILE", help="PEM authority of the server's certificate: the connection has TLS"
    )
    parser.add_argument(
        "--model", default="", help="directory, GGUF file or hub name (default: the default model)"
    )


def add_sampling_arguments(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """Flags that `sampling_of` reads; `max_tokens` is the default of that flag."""
    parser.add_argument("--max-tokens", type=int, default=max_tokens, help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="(default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="0: all tokens (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="the same seed gives the same text")
    parser.add_argument(
        "--stop", action="append", default=[], help="a string that ends the text; may be repeated"
    )


def sampling_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The sampling parameters that the command line gives."""
    names = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop")
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


@contextmanager
def open_source(arguments: argparse.Namespace) -> Iterator[Source]:
    """The server at --url, or the model loaded into this process. Raises one of SOURCE_ERRORS."""
    if arguments.url:
        key = os.environ.get(KEY_VARIABLE)
        tls: dict[str, Any] = {"ssl": True, "root_certificates": arguments.tls_ca} if arguments.tls_ca else {}
        with Client(arguments.url, key=key, **tls) as client:
            yield _Server(client)
    else:
        from fastserve.embedded import Model, ModelServer

        with ModelServer(Model.load(arguments.model)) as server:
            yield _Embedded(server)
