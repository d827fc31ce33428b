"""Streams of several priorities side by side: who gets the first token when.

    python examples/priorities.py --priorities 0 5 10 --streams 40

All streams are sent at once, the least urgent first, as if the others came later. Where they are more than
the server's batch has places (`--max-num-seqs`, 64), the urgent ones take the places of the others: their
time to first token stays short, and the others go on when there is room again, with no token lost.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import dataclass
from statistics import median

from fastserve_client import AsyncClient

PROMPT = "Write a long story about the sea."


@dataclass(frozen=True)
class Timing:
    """What one stream saw, in seconds from its request."""

    first_token: float
    end: float
    tokens: int


async def timed_stream(client: AsyncClient, priority: int, max_tokens: int) -> Timing:
    """Reads one stream to its end."""
    start = time.perf_counter()
    first_token, tokens = 0.0, 0
    async for chunk in client.stream(PROMPT, priority=priority, max_tokens=max_tokens, ignore_eos=True):
        first_token = first_token or time.perf_counter() - start
        tokens += chunk.num_output_tokens
    return Timing(first_token, time.perf_counter() - start, tokens)


async def measure(url: str, priorities: list[int], streams: int, max_tokens: int) -> dict[int, list[Timing]]:
    """So many streams of each priority, all at once: what each saw."""
    ascending = sorted(set(priorities))
    async with AsyncClient(url) as client:
        timings = await asyncio.gather(
            *(timed_stream(client, priority, max_tokens) for priority in ascending for _ in range(streams))
        )
    return {priority: timings[i * streams : (i + 1) * streams] for i, priority in enumerate(ascending)}


def main() -> None:
    """Prints a line per priority."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--url", default="127.0.0.1:8001", help="of the server's gRPC port (default: %(default)s)"
    )
    parser.add_argument("--priorities", type=int, nargs="+", default=[0, 5, 10], metavar="P")
    parser.add_argument("--streams", type=int, default=40, metavar="N", help="of each (default: %(default)s)")
    parser.add_argument(
        "--max-tokens", type=int, default=60, metavar="N", help="of each (default: %(default)s)"
    )
    arguments = parser.parse_args()

    timings = asyncio.run(
        measure(arguments.url, arguments.priorities, arguments.streams, arguments.max_tokens)
    )
    print(
        f"{'priority':>8}{'streams':>9}{'tokens':>8}{'TTFT median':>13}{'longest':>9}{'end median':>12}  (s)"
    )
    for priority, seen in sorted(timings.items(), reverse=True):
        first = [each.first_token for each in seen]
        print(
            f"{priority:>8}{len(seen):>9}{sum(each.tokens for each in seen):>8}"
            f"{median(first):>13.2f}{max(first):>9.2f}{median(each.end for each in seen):>12.2f}"
        )


if __name__ == "__main__":
    main()
