"""What comes back: whole, or in chunks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from fastserve_client.errors import FastServeError

Outputs = Mapping[str, list[Any]]
"""One response of the server: the elements of each output tensor by its name, strings decoded."""


@dataclass(frozen=True)
class Logprob:
    """How likely a token was under the model's own distribution."""

    logprob: float
    """Natural logarithm of its probability."""
    rank: int
    """1 is the likeliest."""
    decoded_token: str


@dataclass(frozen=True)
class Completion:
    """One of the `n` continuations of a prompt. What was not asked for is None."""

    text: str
    finish_reason: str | None
    """`stop` or `length`; None while it goes on."""
    token_ids: list[int] | None
    logprobs: list[dict[int, Logprob]] | None
    """Per token: the chosen one and the likeliest, by token id."""
    cumulative_logprob: float | None
    num_output_tokens: int


@dataclass(frozen=True)
class Timing:
    """Why an answer took as long as it did. Seconds are counted from the request's arrival at the server."""

    queued_seconds: float
    """Until it left the queue for the first time."""
    first_token_seconds: float
    total_seconds: float
    overtaken_by: int
    """Requests that came later and left the queue earlier."""
    cached_tokens: int
    """Of the prompt, found in the prefix cache."""
    preemptions: int
    """How often one of its sequences lost its place in the batch."""
    recomputed_tokens: int
    swapped_tokens: int
    """Whose keys and values came back from host memory after a preemption."""


@dataclass(frozen=True)
class Generation:
    """An answer. Its properties are those of the first completion, the only one unless `n` > 1."""

    completions: list[Completion]
    num_input_tokens: int
    prompt_logprobs: list[dict[int, Logprob]] | None
    """Per token of the prompt, nothing for the first; in a stream the first chunk has them."""
    timing: Timing | None = None
    """Where it was asked for; in a stream the last chunk has it."""

    @property
    def text(self) -> str:
        """The new text, or all of it."""
        return self.completions[0].text

    @property
    def finish_reason(self) -> str | None:
        """`stop` or `length`; None while it goes on."""
        return self.completions[0].finish_reason

    @property
    def token_ids(self) -> list[int] | None:
        """Ids of the tokens; None unless asked for."""
        return self.completions[0].token_ids

    @property
    def logprobs(self) -> list[dict[int, Logprob]] | None:
        """Per token, by token id; None unless asked for."""
        return self.completions[0].logprobs

    @property
    def cumulative_logprob(self) -> float | None:
        """Sum of the log probabilities so far; None unless asked for."""
        return self.completions[0].cumulative_logprob

    @property
    def num_output_tokens(self) -> int:
        """How many tokens there are."""
        return self.completions[0].num_output_tokens


@dataclass(frozen=True)
class Chunk(Generation):
    """What one response of a stream adds to an answer: texts, tokens and their number are the new ones."""


def chunk_of(outputs: Outputs) -> Chunk:
    """The chunk in one response."""
    texts = outputs["text_output"]
    counts = outputs["num_output_tokens"]
    n = len(texts)
    reasons = outputs["finish_reason"]
    cumulative_logprobs = outputs.get("cumulative_logprob", [None] * n)
    logprobs = [_logprobs_of(text) for text in outputs["logprobs"]] if "logprobs" in outputs else [None] * n
    token_ids = _split(outputs["token_ids"], counts) if "token_ids" in outputs else [None] * n
    completions = [
        Completion(
            text=texts[index],
            finish_reason=None if reasons[index] == "None" else reasons[index],
            token_ids=token_ids[index],
            logprobs=logprobs[index],
            cumulative_logprob=cumulative_logprobs[index],
            num_output_tokens=counts[index],
        )
        for index in range(n)
    ]
    return Chunk(
        completions,
        num_input_tokens=outputs["num_input_tokens"][0],
        prompt_logprobs=_logprobs_of(outputs["prompt_logprobs"][0]) if "prompt_logprobs" in outputs else None,
        timing=Timing(**json.loads(outputs["timing"][0])) if "timing" in outputs else None,
    )


def join(chunks: Sequence[Chunk]) -> Generation:
    """The whole answer. Raises FastServeError where there is no chunk: every answer has one."""
    if not chunks:
        raise FastServeError("INTERNAL", "the answer ended without a response")
    parts = zip(*(chunk.completions for chunk in chunks), strict=True)
    return Generation(
        [_join_completion(part) for part in parts],
        chunks[0].num_input_tokens,
        chunks[0].prompt_logprobs,
        chunks[-1].timing,
    )


def _join_completion(parts: tuple[Completion, ...]) -> Completion:
    last = parts[-1]
    return Completion(
        text="".join(part.text for part in parts),
        finish_reason=last.finish_reason,
        token_ids=_join_lists([part.token_ids for part in parts]),
        logprobs=_join_lists([part.logprobs for part in parts]),
        cumulative_logprob=last.cumulative_logprob,
        num_output_tokens=sum(part.num_output_tokens for part in parts),
    )


def _join_lists(lists: list[list[Any] | None]) -> list[Any] | None:
    if all(part is None for part in lists):
        return None
    return [item for part in lists for item in part or []]


def _split(token_ids: list[int], counts: list[int]) -> list[list[int]]:
    """The token ids of each sequence: they come one sequence after the other."""
    ends = accumulate(counts, initial=0)
    return [token_ids[start:end] for start, end in pairwise(ends)]


def _logprobs_of(text: str) -> list[dict[int, Logprob]] | None:
    positions = json.loads(text)
    if positions is None:
        return None
    return [
        {int(token_id): Logprob(**value) for token_id, value in (position or {}).items()}
        for position in positions
    ]
