"""The error that a sentence of the server becomes."""

from __future__ import annotations

import pytest

from fastserve_client import FastServeError
from fastserve_client.errors import server_error


@pytest.mark.parametrize(
    ("status", "sentence", "code", "message"),
    [
        ("INVALID_ARG", "`n`: got 0", "INVALID_ARG", "`n`: got 0"),
        ("UNAVAILABLE", "in ensemble 'fastserve', the queue is full", "UNAVAILABLE", "the queue is full"),
        ("INVALID_ARG", "in ensemble 'fastserve', UNAVAILABLE: full", "UNAVAILABLE", "full"),
        ("INVALID_ARG", "in ensemble 'fastserve', INVALID_ARG: `n`: got 0", "INVALID_ARG", "`n`: got 0"),
        ("INVALID_ARG", "in ensemble 'fastserve', UNAUTHENTICATED: no key", "UNAUTHENTICATED", "no key"),
        ("INTERNAL", "KeyError: 'x'", "INTERNAL", "KeyError: 'x'"),
        (
            "NOT_FOUND",
            "Request for unknown model: 'fastserve' has no available versions",
            "UNAVAILABLE",
            "Request for unknown model: 'fastserve' has no available versions",
        ),
        (
            "NOT_FOUND",
            "Request for unknown model: 'x' is not found",
            "NOT_FOUND",
            "Request for unknown model: 'x' is not found",
        ),
    ],
)
def test_code_and_sentence(status: str, sentence: str, code: str, message: str) -> None:
    error = server_error(sentence, status)
    assert (error.code, error.message) == (code, message)
    assert str(error) == f"{code}: {message}"


@pytest.mark.parametrize(
    ("sentence", "seconds"),
    [
        ("UNAVAILABLE: tenant 'a' is over its quota of 2 requests per second; try again in 0.501 s", 0.501),
        ("UNAVAILABLE: tenant '; try again in 9 s' is over its quota; try again in 30 s", 30.0),
        ("UNAVAILABLE: the queue is full", None),
        ("INVALID_ARG: `tenant`: got '; try again in 9 s'; allowed: text", None),
    ],
)
def test_the_seconds_to_wait(sentence: str, seconds: float | None) -> None:
    assert server_error(f"in ensemble 'fastserve', {sentence}").retry_after == seconds
    assert FastServeError("UNAVAILABLE", sentence).retry_after == seconds
