"""`fastserve openai`: OpenAI's API in front of a Triton server that has FastServe's models."""

from __future__ import annotations

import argparse
import socket
import sys

import uvicorn

from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.model_files import locate
from fastserve.errors import RequestError
from fastserve.launcher.start_checks import OPENAI_PORT
from fastserve.openai_api.app import create_app
from fastserve.openai_api.tool_formats import ToolFormat, tool_format_of
from fastserve.start_error import StartError
from fastserve.text.prompt_tokenizer import PromptTokenizer
from fastserve.text.tokenizer import Tokenizer, load_tokenizer
from fastserve.text.torch_exclusion import keep_torch_out
from fastserve_client import AsyncClient

ERRORS = (ValueError, ModelError)
KEEP_ALIVE_SECONDS = 75
"""A connection may idle; longer than the pools of common clients keep one, so that they close it."""
BACKLOG = 2048
ENCODER_TASKS = ("embed", "classify", "rerank")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the server is, and where to listen."""
    parser.add_argument(
        "--url", default="127.0.0.1:8001", metavar="HOST:PORT", help="its gRPC port (default: %(default)s)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", type=int, default=OPENAI_PORT, metavar="N", help="to listen on (default: %(default)s)"
    )
    parser.add_argument(
        "--served-model-name",
        default="fastserve",
        metavar="NAME",
        help="what requests call the model (default: %(default)s)",
    )
    parser.add_argument(
        "--has-keys",
        action="store_true",
        help="the server asks for keys, which say the tenant: `user` then says nothing",
    )
    parser.add_argument(
        "--model",
        metavar="TEXT",
        help="the served model, as `fastserve serve` takes it; empty: the default one. Its chat template "
        "says how it writes tool calls, its tokenizer counts tokens: without this, both are refused",
    )
    parser.add_argument("--encoders-only", action="store_true", help="the server has encoders and no LLM")
    parser.add_argument(
        "--encoder",
        type=_encoder,
        action="append",
        metavar="TASK=NAME",
        help="an encoder that the server has: TASK is embed, classify or rerank; may be given again",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serves until SIGINT or SIGTERM. Raises StartError where the port is taken, ModelError for `--model`."""
    listener = _listen(arguments.host, arguments.port)
    keep_torch_out()
    tokenizer = None if arguments.model is None else load_tokenizer(locate(arguments.model))
    # A full queue is the client's to wait for: no request is sent again here.
    app = create_app(
        lambda: AsyncClient(arguments.url, retries=0),
        None if arguments.encoders_only else arguments.served_model_name,
        tool_format=None if tokenizer is None else _tool_format(tokenizer),
        has_keys=arguments.has_keys,
        tokenizer=None if tokenizer is None else PromptTokenizer(tokenizer),
        encoders=dict(arguments.encoder or []),
    )
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
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise StartError(f"cannot listen on {host}:{port}: {error.strerror}; give another --port") from error
    # Connections inherit it. asyncio sets it only where a socket's protocol is named, which theirs is not:
    # an event that is sent behind the headers would wait 40 ms for their acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _encoder(text: str) -> tuple[str, str]:
    """An encoder's name and task. Raises ArgumentTypeError."""
    task, _, name = text.partition("=")
    if task not in ENCODER_TASKS or not name:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; allowed: TASK=NAME, TASK one of {', '.join(ENCODER_TASKS)}"
        )
    return name, task


def _tool_format(tokenizer: Tokenizer) -> ToolFormat | None:
    """How the model writes tool calls; None: not known."""
    try:
        return tool_format_of(tokenizer.chat_template.source(tools=[]))
    except RequestError:  # it has no template
        return tool_format_of(None)
