"""What a model can serve of a request: its length, and ids that the model has.

`preprocess` refuses such a request earlier, by the tokenizer. This is the last line of defence: one id beyond
the embedding would end the worker, and every request of the batch with it.
"""

from __future__ import annotations

from collections.abc import Iterable

from fastserve.errors import invalid, prompt_too_long
from fastserve.types import Request


def check_request(request: Request, vocab_size: int, max_model_len: int) -> None:
    """Raises RequestError (INVALID_ARG), which names the field, for a request that the model cannot serve."""
    length = len(request.prompt_token_ids)
    if length == 0:
        raise invalid("prompt", "no tokens", "at least one")
    if length >= max_model_len:
        raise prompt_too_long(length, max_model_len)
    sampling = request.sampling
    fields: tuple[tuple[str, Iterable[int]], ...] = (
        ("prompt", request.prompt_token_ids),
        ("logit_bias", sampling.logit_bias),
        ("stop_token_ids", sampling.stop_token_ids),
        ("bad_words", (token_id for word in request.bad_words_token_ids for token_id in word)),
    )
    for field, token_ids in fields:
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                allowed = f"ids from 0 to {vocab_size - 1}, which are those that the model has"
                raise invalid(field, f"token id {token_id}", allowed)
