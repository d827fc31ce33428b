"""Log-probabilities of tokens, those of a prompt among them, under the model's own distribution."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from fastserve.engine.compute_errors import not_finite
from fastserve.errors import RequestError
from fastserve.scheduling.sequence import Sequence
from fastserve.types import TokenLogprob
from fastserve_kernels import ops


def token_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, counts: list[int]
) -> list[list[TokenLogprob]]:
    """Per row of logits [n, vocab]: (id, logprob, rank) of token_ids[row], then of the likeliest."""
    most = min(max(counts), logits.shape[1])
    chosen, ranks, top_ids, top = ops.log_probs(logits, token_ids, most)
    rows = zip(
        token_ids.tolist(), chosen.tolist(), ranks.tolist(), top_ids.tolist(), top.tolist(), strict=True
    )
    return [
        [(token, logprob, chosen_rank)]
        + [
            (other, value, rank)
            for rank, (other, value) in enumerate(zip(ids[:count], values, strict=False), start=1)
        ]
        for count, (token, logprob, chosen_rank, ids, values) in zip(counts, rows, strict=True)
    ]


class PromptLogprobs:
    """The log-probabilities of a prompt's tokens, collected as its chunks are computed."""

    def __init__(self, sequence: Sequence, count: int) -> None:
        """`count`: how many of the likeliest are reported beside each token."""
        self._sequence = sequence
        self._count = count
        self.entries: list[list[TokenLogprob]] = [[]]
        """By position, as far as they are computed; the first has none."""

    def extend(
        self, hidden: torch.Tensor, to_logits: Callable[[torch.Tensor], torch.Tensor]
    ) -> RequestError | None:
        """Adds those of the chunk that was computed last, of which `hidden` [tokens, hidden size] came.

        The row of a position tells of the token after it. What is computed again, after a preemption or in a
        step that raised, has been collected already. Returns an error if the numbers are not finite.
        """
        sequence = self._sequence
        start = sequence.num_computed_tokens
        first = max(start, len(self.entries) - 1)
        last = min(start + len(hidden), sequence.num_prompt_tokens - 1)
        if first >= last:
            return None
        logits = to_logits(hidden[first - start : last - start])
        targets = torch.tensor(sequence.token_ids[first + 1 : last + 1], device=logits.device)
        found = token_logprobs(logits, targets, [self._count] * (last - first))
        for position, entries in enumerate(found, start=first):
            if math.isnan(entries[0][1]):
                return not_finite(position)
        self.entries += found
        return None
