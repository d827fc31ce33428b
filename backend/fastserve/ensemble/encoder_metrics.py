"""The metrics of a served encoder. How long its requests wait, Triton server itself says
(`nv_inference_queue_duration_us`)."""

from __future__ import annotations

from collections.abc import Sequence

from fastserve.encoders.ragged_batch import TokenSequence
from fastserve.ensemble.metrics import Counter, Histogram

_SIZES = [2**exponent for exponent in range(9)]
_TOKENS = [2**exponent for exponent in range(4, 18)]


class EncoderMetrics:
    """Of one model, whose name is the label `model`."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._texts = Histogram(
            "fastserve_encoder_batch_texts", "Texts computed together", ["model"], buckets=_SIZES
        )
        self._batch_tokens = Histogram(
            "fastserve_encoder_batch_tokens", "Tokens computed together", ["model"], buckets=_TOKENS
        )
        self._tokens = Counter("fastserve_encoder_tokens_total", "Tokens computed", ["model"])
        self._requests = Counter(
            "fastserve_encoder_requests_total", "Requests by how they ended", ["model", "outcome"]
        )

    def observe_batch(self, sequences: Sequence[TokenSequence]) -> None:
        """Reports what is computed together."""
        num_tokens = sum(map(len, sequences))
        self._texts.observe(len(sequences), self._model)
        self._batch_tokens.observe(num_tokens, self._model)
        self._tokens.add(num_tokens, self._model)

    def count(self, outcome: str) -> None:
        """Counts a request that has ended: `success`, `rejected` or `error`."""
        self._requests.add(1, self._model, outcome)
