"""The one error type that reaches a client."""

from __future__ import annotations

import re
import reprlib
from enum import Enum

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 80


class ErrorCode(str, Enum):
    """Why a request failed; each is the Triton server status code of the same name."""

    INVALID_ARG = "INVALID_ARG"
    UNAVAILABLE = "UNAVAILABLE"
    CANCELLED = "CANCELLED"
    INTERNAL = "INTERNAL"


class RequestError(Exception):
    """A request that cannot be served, with a sentence for whoever sent it.

    `str(error)` names the field, what came and what is allowed; `code` is the status the client sees.
    """

    def __init__(self, message: str, code: ErrorCode = ErrorCode.INVALID_ARG) -> None:
        super().__init__(message)
        self.code = code


_WRITTEN = re.compile(rf"(?:in ensemble '[^']*', )?({'|'.join(ErrorCode)}): ")
"""The code before the sentence of an error. An ensemble adds its name."""


def with_code(error: RequestError) -> str:
    """The error as it is written where only the sentence travels: `CODE: sentence`."""
    return f"{error.code.value}: {error}"


def read_error(message: str) -> RequestError | None:
    """The error that `with_code` has written; None where another has written the message."""
    written = _WRITTEN.match(message)
    return written and RequestError(message[written.end() :], ErrorCode(written[1]))


def invalid(field: str, came: object, allowed: str) -> RequestError:
    """The error for a field whose value is not one of those allowed."""
    try:
        shown = _BRIEF.repr(came)
    except ValueError:  # Python writes no integer of more than 4300 digits
        shown = "a huge integer"
    return RequestError(f"`{field}`: got {shown}; allowed: {allowed}")


def prompt_too_long(num_tokens: int, max_model_len: int) -> RequestError:
    """The error for a prompt that leaves no room for an answer in the model's length or its KV cache."""
    return RequestError(
        f"prompt: got {num_tokens} tokens; allowed: at most {max_model_len - 1} (model length and KV cache)"
    )
