"""A chat in the terminal with a server that runs, over gRPC.

    python examples/chat.py --system "You answer in one sentence."

An empty line or Ctrl-D ends it. Ctrl-C during an answer stops that answer, on the server too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from fastserve_client import Client, FastServeError, Message


def main() -> None:
    """Reads questions and prints answers, each with all that was said before it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--url", default="127.0.0.1:8001", help="of the server's gRPC port (default: %(default)s)"
    )
    parser.add_argument("--system", help="what the model is told first")
    parser.add_argument(
        "--temperature", type=float, default=0.7, help="0: the likeliest token (default: %(default)s)"
    )
    arguments = parser.parse_args()

    messages: list[Message] = []
    if arguments.system:
        messages.append({"role": "system", "content": arguments.system})
    with Client(arguments.url) as client:
        for question in questions():
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer(client, messages, arguments.temperature)})


def questions() -> Iterable[str]:
    """What the user types, until an empty line or the end of the input."""
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        if not question:
            return
        yield question


def answer(client: Client, messages: list[Message], temperature: float) -> str:
    """Prints the answer as it comes, and gives what was printed."""
    text = ""
    try:
        with client.stream(messages=messages, temperature=temperature, max_tokens=512) as chunks:
            for chunk in chunks:
                print(chunk.text, end="", flush=True)
                text += chunk.text
    except KeyboardInterrupt:  # leaving the `with` has cancelled the request
        print(" (stopped)", end="")
    except FastServeError as error:
        print(f"({error})", end="")
    print()
    return text


if __name__ == "__main__":
    main()
