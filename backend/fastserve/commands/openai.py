"""`fastserve openai`: OpenAI's API in front of a Triton server that has FastServe's models."""

from __future__ import annotations

import argparse
import socket
import sys

import uvicorn

from fastserve.openai_api.app import create_app
from fastserve.start_error import StartError
from fastserve_client import AsyncClient

ERRORS = (ValueError,)
DEFAULT_PORT = 9000
KEEP_ALIVE_SECONDS = 75
"""A connection may idle; longer than the pools of common clients keep one, so that they close it."""
BACKLOG = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the server is, and where to listen."""
    parser.add_argument(
        "--url", default="127.0.0.1:8001", metavar="HOST:PORT", help="its gRPC port (default: %(default)s)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", type=int, default=DEFAULT_PORT, metavar="N", help="to listen on (default: %(default)s)"
    )
    parser.add_argument(
        "--served-model-name",
        default="fastserve",
        metavar="NAME",
        help="what requests call the model (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serves until SIGINT or SIGTERM. Raises StartError where the port is taken."""
    listener = _listen(arguments.host, arguments.port)
    # A full queue is the client's to wait for: no request is sent again here.
    app = create_app(lambda: AsyncClient(arguments.url, retries=0), arguments.served_model_name)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="on",
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            server_header=False,
        )
    )
    print(f"OpenAI's API on port {arguments.port}", file=sys.stderr, flush=True)
    server.run(sockets=[listener])
    return 0


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise StartError(f"cannot listen on {host}:{port}: {error.strerror}; give another --port") from error
