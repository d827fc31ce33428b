"""A file of prompts, one a line, to a file of answers in JSON lines, behind all other traffic.

    python examples/batch_job.py prompts.txt answers.jsonl --max-tokens 200

The requests have a low priority, so that those of others take their places whenever they need them. At most
`--concurrency` are on the server at a time. Answers are written as they come, with the number of their line.
Started again, a job that was interrupted goes on where it was, and tries again what failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from fastserve_client import AsyncClient, FastServeError, Options

LOW_PRIORITY = -10
RETRIES = 8
"""Of a request that a full queue refused; each wait is longer than the one before, up to five seconds."""


def lines_done(answers: Path) -> set[int]:
    """The lines that have their answer. What an interrupted run left of a last one is cut off."""
    if not answers.exists():
        return set()
    written = answers.read_bytes()
    whole = written[: written.rfind(b"\n") + 1]
    if whole != written:
        with answers.open("r+b") as file:
            file.truncate(len(whole))
    return {json.loads(line)["line"] for line in whole.splitlines()}


async def answer_all(
    client: AsyncClient, prompts: Iterator[tuple[int, str]], out: TextIO, options: Options
) -> int:
    """Takes prompts until there are none left, and writes the answers. Gives how many failed."""
    failures = 0
    for line, prompt in prompts:  # shared by all workers: each takes the next one
        try:
            generation = await client.generate(prompt, **options)
        except FastServeError as error:
            print(f"line {line}: {error}", file=sys.stderr)
            failures += 1
            continue
        answer: dict[str, Any] = {
            "line": line,
            "prompt": prompt,
            "text": generation.text,
            "finish_reason": generation.finish_reason,
        }
        out.write(json.dumps(answer) + "\n")
        out.flush()
    return failures


async def run(arguments: argparse.Namespace) -> int:
    """Answers what has no answer yet. Gives how many failed."""
    done = lines_done(arguments.answers)
    lines = arguments.prompts.read_text().splitlines()
    left = [(line, prompt) for line, prompt in enumerate(lines, 1) if prompt.strip() and line not in done]
    print(f"{len(done)} lines have their answer, {len(left)} are left", file=sys.stderr)
    options: Options = {"priority": LOW_PRIORITY, "max_tokens": arguments.max_tokens, "temperature": 0}
    prompts = iter(left)
    with arguments.answers.open("a") as out:
        async with AsyncClient(arguments.url, retries=RETRIES) as client:
            workers = (answer_all(client, prompts, out, options) for _ in range(arguments.concurrency))
            return sum(await asyncio.gather(*workers))


def main() -> int:
    """The exit status: 1 if a request failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompts", type=Path, help="a text file, a prompt on each line")
    parser.add_argument("answers", type=Path, help="JSON lines: line, prompt, text, finish_reason")
    parser.add_argument(
        "--url", default="127.0.0.1:8001", help="of the server's gRPC port (default: %(default)s)"
    )
    parser.add_argument("--concurrency", type=int, default=16, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--max-tokens", type=int, default=100, metavar="N", help="of each (default: %(default)s)"
    )
    return 1 if asyncio.run(run(parser.parse_args())) else 0


if __name__ == "__main__":
    sys.exit(main())
