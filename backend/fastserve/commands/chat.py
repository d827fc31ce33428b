"""`fastserve chat`: a conversation with the model, in the terminal."""

from __future__ import annotations

import argparse

from fastserve.commands import source

ERRORS = source.SOURCE_ERRORS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The system message, where to get answers, and how to sample."""
    parser.add_argument("--system", help="the system message")
    source.add_source_arguments(parser)
    source.add_sampling_arguments(parser, max_tokens=512)


def run(arguments: argparse.Namespace) -> int:
    """Talks until an empty line or the end of the input. Raises SOURCE_ERRORS."""
    messages = [{"role": "system", "content": arguments.system}] if arguments.system else []
    with source.open_source(arguments) as texts:
        print("An empty line or Ctrl-D ends the conversation.")
        while words := _read():
            messages.append({"role": "user", "content": words})
            messages.append({"role": "assistant", "content": _answer(texts, messages, arguments)})
    return 0


def _read() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _answer(texts: source.Source, messages: list[dict[str, str]], arguments: argparse.Namespace) -> str:
    pieces = []
    for text in texts.stream(messages, **source.sampling_of(arguments)):
        print(text, end="", flush=True)
        pieces.append(text)
    print()
    return "".join(pieces)
