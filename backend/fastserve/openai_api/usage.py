"""How many tokens an answer took, and why as long as it did."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from fastserve_client import Generation, Timing


class Usage:
    """The tokens of one or more answers, counted as they come."""

    def __init__(self, num_prompts: int = 1) -> None:
        self._prompt_tokens = [0] * num_prompts
        self._completion_tokens = 0
        self._timings: list[Timing | None] = [None] * num_prompts

    def add(self, part: Generation, prompt: int = 0) -> None:
        """Counts an answer, or a chunk of one, to the prompt of that index."""
        self._prompt_tokens[prompt] = part.num_input_tokens
        self._completion_tokens += sum(each.num_output_tokens for each in part.completions)
        self._timings[prompt] = part.timing or self._timings[prompt]

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompts that the prefix cache had."""
        return sum(timing.cached_tokens for timing in self._timings if timing is not None)

    def timing_json(self) -> Any:
        """The `fastserve` object of an answer: of each prompt, where there are several."""
        timings = [None if timing is None else asdict(timing) for timing in self._timings]
        return timings[0] if len(timings) == 1 else timings

    def responses_json(self) -> dict[str, Any]:
        """The `usage` of OpenAI's Responses API."""
        counts = self.json()
        return {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": counts["prompt_tokens_details"],
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counts["total_tokens"],
        }

    def json(self) -> dict[str, Any]:
        """OpenAI's `usage` of a chat or a completion."""
        prompt_tokens = sum(self._prompt_tokens)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def usage_of(answers: Iterable[Generation]) -> Usage:
    """That of whole answers, each to a prompt of its own."""
    whole = list(answers)
    usage = Usage(len(whole))
    for index, answer in enumerate(whole):
        usage.add(answer, index)
    return usage
