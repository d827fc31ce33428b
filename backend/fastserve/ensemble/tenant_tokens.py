"""Tokens that the engine computed, by tenant: what fairness goes by in the common queue."""

from __future__ import annotations

from fastserve.ensemble.response_stream import ResponseStream
from fastserve.scheduling.capacity import TenantTokens
from fastserve.types import SequenceOutput


class TenantTokenCounter:
    """Sums the outputs of a step, so that the queue is told once of each tenant."""

    def __init__(self) -> None:
        self._counts: dict[str, tuple[int, int]] = {}

    def count(self, stream: ResponseStream, output: SequenceOutput) -> None:
        """Counts one output before the stream has taken it in: with a request's first one, its prompt too."""
        num_prompt_tokens = 0 if stream.has_output else len(stream.request.prompt_token_ids)
        prompt, generated = self._counts.get(stream.request.tenant, (0, 0))
        self._counts[stream.request.tenant] = (prompt + num_prompt_tokens, generated + len(output.token_ids))

    def take(self) -> list[TenantTokens]:
        """What was counted since the last call."""
        counts, self._counts = self._counts, {}
        return [TenantTokens(tenant, *tokens) for tenant, tokens in counts.items()]
