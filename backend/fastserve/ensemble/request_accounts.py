"""What `postprocess` tells of requests to others than their clients: its metrics and the request log."""

from __future__ import annotations

from dataclasses import dataclass, field

from msgspec.structs import replace

from fastserve.access.request_log import open_request_log, record_of
from fastserve.config import Config
from fastserve.ensemble.metrics import ResponseMetrics
from fastserve.scheduling.request_labels import RequestLabels
from fastserve.types import Outcome, Request, RequestOutput


@dataclass(slots=True)
class RequestAccount:
    """What has come to one request."""

    request: Request
    first_token: float
    """Its time, `time.monotonic()`."""
    num_tokens: int = 0
    num_cached_tokens: int = 0
    answers: list[str] = field(default_factory=list)
    """The text so far of each sequence, where the request log has texts."""


class RequestAccounts:
    """Each metric is a message to the server's process: tokens do not wait for it."""

    def __init__(self, config: Config) -> None:
        self._metrics = ResponseMetrics(RequestLabels(config))
        self.request_log = open_request_log(config)

    def count(self, account: RequestAccount, output: RequestOutput, now: float) -> None:
        """Counts an output's tokens and, with the last one, the request."""
        num_tokens = sum(len(each.token_ids) for each in output.outputs)
        if output.request is not None and num_tokens > 0:
            self._metrics.observe_first_token(output.request, now)
        account.num_tokens += num_tokens
        for each in output.outputs:
            account.num_cached_tokens = max(account.num_cached_tokens, each.num_cached_tokens)
        self._metrics.count_tokens(account.request, num_tokens, now)
        if output.final:
            self._metrics.report_tokens()
            self._metrics.observe_end(
                account.request, outcome_of(output), account.num_tokens, account.first_token, now
            )

    def count_failed(self) -> None:
        """Counts a request that has failed in `postprocess`."""
        self._metrics.requests.add(1, Outcome.ERROR.value)
        self._metrics.report_tokens()

    def keep_text(self, account: RequestAccount, text: list[str]) -> None:
        """Keeps what a response adds to the text of each sequence, where the request log has texts."""
        if self.request_log.has_text:
            before = account.answers or [""] * len(text)
            account.answers = [old + new for old, new in zip(before, text, strict=True)]

    def log(self, account: RequestAccount, outcome: Outcome, now: float, code: str = "") -> None:
        """Writes the request into the request log. `code`: of the error that it has ended with."""
        if not self.request_log.is_enabled:
            return
        record = record_of(account.request, outcome.value, now)
        first_token = round(account.first_token - account.request.arrival, 6) if account.num_tokens else None
        self.request_log.write(
            replace(
                record,
                code=code,
                cached_tokens=account.num_cached_tokens,
                output_tokens=account.num_tokens,
                first_token_seconds=first_token,
                answers=account.answers or None,
            )
        )

    def close(self) -> None:
        """Ends the request log."""
        self.request_log.close()


def outcome_of(output: RequestOutput) -> Outcome:
    """How the request of a last output ended."""
    return (output.outputs[-1].outcome if output.outputs else None) or Outcome.ERROR
