"""The command `fastserve`: finds the subcommand's module and runs it."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from fastserve import __version__
from fastserve.config import ConfigError
from fastserve.start_error import StartError

COMMANDS = {
    "serve": "serve a model through Triton server",
    "keys": "add, list and revoke the keys of a server's clients",
    "generate": "continue a text",
    "openai": "OpenAI's API in front of a Triton server that has FastServe's models",
    "chat": "converse with a model in the terminal",
    "compress": "make a checkpoint smaller, and report what it cost",
    "evaluate": "measure a model's perplexity, its distance to another, and tasks of lm-eval",
    "embed": "write the embeddings of a file's lines",
    "simulate": "compare scheduling policies on a workload, without a model",
    "bench": "measure a server, or the engine inside this process",
}
"""Each is the module of that name in `fastserve.commands`, imported only when it is asked for."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line (None: this process's) and returns its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="fastserve", description="LLM serving inside NVIDIA Triton Inference Server"
    )
    parser.add_argument("--version", action="version", version=f"fastserve {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if words[:1] == [name]:
            module = importlib.import_module(f"fastserve.commands.{name}")
            module.add_arguments(subparser)
    parsed = parser.parse_args(words)
    try:
        return module.run(parsed)
    except (ConfigError, StartError, *module.ERRORS) as error:
        print(f"fastserve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
