"""The one error type that reaches a client."""

from __future__ import annotations

import re
import reprlib
from enum import Enum

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 80


class ErrorCode(str, Enum):
    """Why a request failed: status codes of Triton server, and two of gRPC that it does not have."""

    INVALID_ARG = "INVALID_ARG"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    """No key was shown that holds."""
    PERMISSION_DENIED = "PERMISSION_DENIED"
    """The key does not allow it."""
    UNAVAILABLE = "UNAVAILABLE"
    CANCELLED = "CANCELLED"
    INTERNAL = "INTERNAL"

    @property
    def triton_code(self) -> str:
        """The status code of Triton server that stands for it."""
        has_none = self in (ErrorCode.UNAUTHENTICATED, ErrorCode.PERMISSION_DENIED)
        return ErrorCode.INVALID_ARG.value if has_none else self.value


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


_CONTENT = frozenset(
    {
        "text_input",
        "prompt_token_ids",
        "messages",
        "tools",
        "chat_template_kwargs",
        "sampling_parameters",
        "stop",
        "bad_words",
        "structured_outputs",
        "guided_decoding",
        "text",
        "query",
        "document",
    }
)
"""Fields that hold what users write, at any depth: an error must not, since it goes into others' logs."""
_NO_CONTENT = frozenset(["role", "type"])
"""Members of those that hold a word of the API."""


def invalid(field: str, came: object, allowed: str) -> RequestError:
    """The error for a field whose value is not one of those allowed; `shown` is what it says of the value."""
    return RequestError(f"`{field}`: got {shown(field, came)}; allowed: {allowed}")


def shown(field: str, came: object) -> str:
    """A value as an error may show it: cut, and of a field that holds what users write, its kind and size."""
    if holds_content(field):
        return _kind(came)
    try:
        return _BRIEF.repr(came)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "a huge integer"


def holds_content(field: str) -> bool:
    """Whether a field, such as `messages[0].content`, holds what users write."""
    names = re.findall(r"[A-Za-z_]\w*", field)
    return bool(names) and names[0] in _CONTENT and names[-1] not in _NO_CONTENT


def _kind(came: object) -> str:
    if came is None or isinstance(came, bool):
        return repr(came)
    if isinstance(came, str):
        return f"a text of {len(came)} characters"
    if isinstance(came, bytes | bytearray):
        return f"{len(came)} bytes"
    if isinstance(came, list | tuple):
        return f"a list of {len(came)}"
    if isinstance(came, dict):
        return f"an object of {len(came)} members"
    return f"a value of the type {type(came).__name__}"


def prompt_too_long(num_tokens: int, max_model_len: int) -> RequestError:
    """The error for a prompt that leaves no room for an answer in the model's length or its KV cache."""
    return RequestError(
        f"prompt: got {num_tokens} tokens; allowed: at most {max_model_len - 1} (model length and KV cache)"
    )
