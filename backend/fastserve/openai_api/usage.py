"""How many tokens an answer took."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastserve_client import Generation


class Usage:
    """The tokens of one or more answers, counted as they come."""

    def __init__(self, num_prompts: int = 1) -> None:
        self._prompt_tokens = [0] * num_prompts
        self._completion_tokens = 0

    def add(self, part: Generation, prompt: int = 0) -> None:
        """Counts an answer, or a chunk of one, to the prompt of that index."""
        self._prompt_tokens[prompt] = part.num_input_tokens
        self._completion_tokens += sum(each.num_output_tokens for each in part.completions)

    def json(self) -> dict[str, Any]:
        """OpenAI's `usage`."""
        prompt_tokens = sum(self._prompt_tokens)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": prompt_tokens + self._completion_tokens,
        }


def usage_of(answers: Iterable[Generation]) -> dict[str, Any]:
    """OpenAI's `usage` of whole answers, each to a prompt of its own."""
    whole = list(answers)
    usage = Usage(len(whole))
    for index, answer in enumerate(whole):
        usage.add(answer, index)
    return usage.json()
