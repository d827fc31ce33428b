"""Log-probabilities in the two shapes that OpenAI has for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastserve_client import Completion, Logprob

Position = Mapping[int, Logprob]


def _likeliest(position: Position, count: int) -> list[Logprob]:
    return sorted((each for each in position.values() if each.rank <= count), key=lambda each: each.rank)


def chat_logprobs(completion: Completion, count: int) -> dict[str, Any] | None:
    """`logprobs` of a chat's choice, with the `count` likeliest at each token; None without a token."""
    if not completion.token_ids or completion.logprobs is None:
        return None
    pairs = zip(completion.token_ids, completion.logprobs, strict=True)
    content = [
        _chat_token(position[token_id])
        | {"top_logprobs": [_chat_token(each) for each in _likeliest(position, count)]}
        for token_id, position in pairs
    ]
    return {"content": content, "refusal": None}


def _chat_token(entry: Logprob) -> dict[str, Any]:
    """`bytes` are those of the token's text: of a token that is part of a character, U+FFFD's."""
    return {
        "token": entry.decoded_token,
        "logprob": entry.logprob,
        "bytes": list(entry.decoded_token.encode(errors="replace")),
    }


def _empty_shape() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


class CompletionLogprobs:
    """`logprobs` of the choices of a text completion; offsets go on from chunk to chunk."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._offset = 0
        """Characters before the next token."""

    def json(self, token_ids: Sequence[int], positions: Sequence[Position]) -> dict[str, Any]:
        """The shape: a list of each of tokens, log-probabilities, likeliest ones and offsets."""
        shape = _empty_shape()
        for token_id, position in zip(token_ids, positions, strict=True):
            self._append(shape, position[token_id].decoded_token, position[token_id].logprob, position)
        return shape

    def of_prompt(self, positions: Sequence[Position], text: str) -> dict[str, Any]:
        """The same for a prompt of this text: nothing is known of its first token but its text."""
        shape = _empty_shape()
        chosen = [next(iter(position.values())) for position in positions[1:]]
        rest = "".join(entry.decoded_token for entry in chosen)
        first = text.removesuffix(rest) if text.endswith(rest) else ""
        self._append(shape, first, None, None)
        for entry, position in zip(chosen, positions[1:], strict=True):
            self._append(shape, entry.decoded_token, entry.logprob, position)
        return shape

    def _append(
        self, shape: dict[str, list[Any]], token: str, logprob: float | None, position: Position | None
    ) -> None:
        shape["tokens"].append(token)
        shape["token_logprobs"].append(logprob)
        likeliest = None if position is None else _likeliest(position, self._count)
        shape["top_logprobs"].append(
            None if likeliest is None else {each.decoded_token: each.logprob for each in likeliest}
        )
        shape["text_offset"].append(self._offset)
        self._offset += len(token)
