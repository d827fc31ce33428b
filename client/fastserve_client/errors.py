"""The errors of a call."""

from __future__ import annotations

import re

# The Triton server's gRPC streams say no code, and over HTTP it answers 400 whatever the code of a decoupled
# model's error was: so FastServe writes codes other than INVALID_ARG before the sentence. The ensemble adds
# its name before that.
_ENSEMBLE = re.compile(r"^in ensemble '[^']*', ")
_CODE = re.compile(r"^(INVALID_ARG|UNAVAILABLE|CANCELLED|INTERNAL): ")


class FastServeError(Exception):
    """A call that failed.

    `code` is the status code of the Triton server (`INVALID_ARG`, `UNAVAILABLE`, `CANCELLED`, `INTERNAL`,
    `NOT_FOUND`, `UNSUPPORTED`) or `DEADLINE_EXCEEDED`; `message` is the server's sentence.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class DeadlineExceeded(FastServeError, TimeoutError):
    """The call's `timeout` passed before its last response."""

    def __init__(self, message: str = "the call's timeout passed before its last response") -> None:
        super().__init__("DEADLINE_EXCEEDED", message)


def server_error(message: str, code: str = "INVALID_ARG") -> FastServeError:
    """The error for what the server said; a code written in `message` is more exact than `code`."""
    sentence = _ENSEMBLE.sub("", message)
    if written := _CODE.match(sentence):
        return FastServeError(written[1], sentence[written.end() :])
    return FastServeError(code, sentence)
