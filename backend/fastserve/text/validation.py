"""From what a client sent to the type and the token ids a field may have.

Values may be strings; errors name the field, what came and what is allowed.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec
from msgspec import inspect

from fastserve.errors import RequestError, invalid, shown
from fastserve.text.type_words import type_words
from fastserve.types import Request

MAX_JSON_DEPTH = 128
_INT64 = range(-(2**63), 2**63)
_PLAIN = (str, int, float, list, tuple, dict)


def decode_text(field: str, value: object) -> str:
    """`value` as text that can be encoded: str, or UTF-8 bytes. Raises RequestError."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"`{field}`: got a lone surrogate at character {error.start}; allowed: text without "
                "lone surrogates"
            ) from error
        return value
    if isinstance(value, bytes | bytearray):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            at = f"what is no UTF-8 at byte {error.start}"
            raise RequestError(f"`{field}`: got {at}; allowed: text in UTF-8") from error
    raise invalid(field, value, "text")


def decode_json(field: str, value: object) -> Any:
    """The JSON value in a str or UTF-8 bytes; anything else is taken as decoded already.

    Raises RequestError, also for a value nested deeper than MAX_JSON_DEPTH, or one that JSON does not have.
    """
    if isinstance(value, str | bytes | bytearray):
        text = decode_text(field, value)
        try:
            value = msgspec.json.decode(text)
        except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
            raise RequestError(
                f"`{field}`: got {shown(field, text)}; allowed: valid JSON ({error})"
            ) from error
    _check_plain(field, value)
    return value


def coerce(field: str, value: object, kind: Any, allowed: str | None = None) -> Any:
    """`value` as the type `kind` (one that msgspec knows), from its own form or from a string.

    "0.5" is a number, "true" a boolean, and a string of JSON a list or an object; a boolean is no number and
    "1.5" no integer. Raises RequestError, which says what is `allowed` (default: what the type says).
    """
    described, words = _described(kind)
    if isinstance(value, bytes | bytearray) or (
        isinstance(value, str) and isinstance(described, inspect.StrType)
    ):
        value = decode_text(field, value)
    if isinstance(value, str) and isinstance(described, inspect.ListType | inspect.DictType):
        value = decode_json(field, value)
    allowed = allowed or words
    if not isinstance(value, _PLAIN):  # msgspec would look inside objects of any other class
        raise invalid(field, value, allowed)
    try:
        result = msgspec.convert(value, kind, strict=False)
    except (ValueError, RecursionError) as error:
        raise invalid(field, value, allowed) from error
    if isinstance(result, int) and result not in _INT64:
        raise invalid(field, value, f"{allowed}, in 64 bits")
    return result


def unknown_name(what: str, name: object, allowed: Iterable[str], prefix: str = "") -> RequestError:
    """The error for a name that is none of those allowed; it offers the nearest.

    `prefix`: what comes before the name, such as `messages[0].`.
    """
    written = str(name)[:60].encode(errors="backslashreplace").decode()
    near = difflib.get_close_matches(written, allowed, n=1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`? " if near else ""
    return RequestError(
        f"`{prefix}{written}`: no such {what}; {hint}allowed: {', '.join(sorted(allowed)) or 'none'}"
    )


@cache
def _described(kind: Any) -> tuple[inspect.Type, str]:
    """What msgspec knows of a type, and the same in words."""
    described = inspect.type_info(kind)
    return described, type_words(described)


def _check_plain(field: str, value: object) -> None:
    """Raises RequestError unless `value` is what JSON can say, not too deep. No recursion: it may be deep."""
    pending = [(value, 0)]
    while pending:
        item, depth = pending.pop()
        if depth > MAX_JSON_DEPTH:
            raise RequestError(
                f"`{field}`: got a value nested deeper than {MAX_JSON_DEPTH}; allowed: a flatter one"
            )
        if isinstance(item, dict):
            pending += [(child, depth + 1) for child in item.values()]
        elif isinstance(item, list | tuple):
            pending += [(child, depth + 1) for child in item]
        elif item is not None and not isinstance(item, str | int | float):
            raise invalid(field, item, "values that JSON has")


@dataclass(frozen=True)
class Vocabulary:
    """The sizes of a tokenizer's vocabulary and of its model's.

    A model's is often padded with ids that mean nothing. A tokenizer that got tokens for which its model was
    not resized is an accident: such a token has no row in the embedding.
    """

    tokenizer_size: int
    model_size: int

    @property
    def size(self) -> int:
        """Every id of a request is below it."""
        return min(self.tokenizer_size, self.model_size)

    @property
    def mismatch(self) -> str:
        """A clause for errors and logs where the tokenizer is the larger one; empty where it is not."""
        if self.tokenizer_size <= self.model_size:
            return ""
        return f"the tokenizer has {self.tokenizer_size} tokens, more than the model's {self.model_size}"

    @property
    def allowed(self) -> str:
        """The ids in words, for errors."""
        because = f", as {self.mismatch}" if self.mismatch else ""
        return f"token ids from 0 to {self.size - 1}{because}"

    def check(self, field: str, token_ids: Collection[int]) -> None:
        """Raises RequestError, naming `field`, if one of the ids is not allowed."""
        for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
            if not 0 <= token_id < self.size:
                raise RequestError(f"`{field}`: got the token {token_id}; allowed: {self.allowed}")

    def check_request(self, request: Request) -> None:
        """Raises RequestError as `check` does, for any of the ids that a request names."""
        self.check("prompt", request.prompt_token_ids)
        self.check("logit_bias", request.sampling.logit_bias)
        self.check("stop_token_ids", request.sampling.stop_token_ids)
        for word in request.bad_words_token_ids:
            self.check("bad_words", word)
