"""The errors of a call."""

from __future__ import annotations

import re

# The Triton server's gRPC streams say no code, and over HTTP `generate` it answers 400 whatever the code of a
# model's error was: so FastServe writes the code before the sentence. The ensemble adds its name before that.
_ENSEMBLE = re.compile(r"^in ensemble '[^']*', ")
_CODE = re.compile(r"^(INVALID_ARG|UNAUTHENTICATED|PERMISSION_DENIED|UNAVAILABLE|CANCELLED|INTERNAL): ")
# No header or field of an error comes through the Triton server either: the seconds stand in the sentence.
_RETRY_AFTER = re.compile(r"; try again in (\d+(?:\.\d+)?) s$")
# What the Triton server itself says of a model that it has and that is not loaded now.
_NOT_LOADED = re.compile(r"has no available versions|' is not ready")


class FastServeError(Exception):
    """A call that failed.

    `code` is the status code of the Triton server (`INVALID_ARG`, `UNAVAILABLE`, `CANCELLED`, `INTERNAL`,
    `NOT_FOUND`, `UNSUPPORTED`), FastServe's own about keys (`UNAUTHENTICATED`, `PERMISSION_DENIED`) or
    `DEADLINE_EXCEEDED`; `message` is the server's sentence. `retry_after`: the seconds after which the server
    says that the request may come again; None where it does not say.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        written = _RETRY_AFTER.search(message)
        self.retry_after = float(written[1]) if written else None


class DeadlineExceeded(FastServeError, TimeoutError):
    """The call's `timeout` passed before its last response."""

    def __init__(self, message: str = "the call's timeout passed before its last response") -> None:
        super().__init__("DEADLINE_EXCEEDED", message)


def server_error(message: str, code: str = "INVALID_ARG") -> FastServeError:
    """The error for what the server said; a code written in `message` is more exact than `code`."""
    sentence = _ENSEMBLE.sub("", message)
    if written := _CODE.match(sentence):
        return FastServeError(written[1], sentence[written.end() :])
    if _NOT_LOADED.search(sentence):
        return FastServeError("UNAVAILABLE", sentence)
    return FastServeError(code, sentence)
