"""`fastserve generate PROMPT`: continues a text, streaming to the terminal."""

from __future__ import annotations

import argparse
import sys

from fastserve.commands import source

ERRORS = source.SOURCE_ERRORS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The prompt, where to get its continuation, and how to sample."""
    parser.add_argument(
        "prompt", nargs="?", help="the text to continue; without it, it is read from standard input"
    )
    source.add_source_arguments(parser)
    source.add_sampling_arguments(parser, max_tokens=128)


def run(arguments: argparse.Namespace) -> int:
    """Writes the continuation to standard output. Raises SOURCE_ERRORS."""
    prompt = arguments.prompt if arguments.prompt is not None else sys.stdin.read()
    with source.open_source(arguments) as texts:
        for text in texts.stream(prompt, **source.sampling_of(arguments)):
            print(text, end="", flush=True)
    print()
    return 0
