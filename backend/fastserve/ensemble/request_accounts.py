"""What `postprocess` tells of requests to others than their clients: its metrics and the request log."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from fastserve.access.request_log import open_request_log, record_of
from fastserve.config import Config
from fastserve.ensemble.metrics import ResponseMetrics
from fastserve.scheduling.request_labels import RequestLabels
from fastserve.types import Outcome, Preemptions, Request, RequestOutput


class Timing(Struct, frozen=True, kw_only=True):
    """Why a request took as long as it did. Seconds are counted from its arrival at `preprocess`."""

    queued_seconds: float
    """Until it left the queue for the first time."""
    first_token_seconds: float
    total_seconds: float
    overtaken_by: int
    """Requests that came later and left the queue earlier."""
    cached_tokens: int
    """Of the prompt, found in the prefix cache."""
    preemptions: int
    """How often one of its sequences lost its place in the batch."""
    recomputed_tokens: int
    """Computed again after that."""
    swapped_tokens: int
    """Whose keys and values came back from host memory after that."""

    def json(self) -> str:
        """As the output `timing` has it."""
        return msgspec.json.encode(self).decode()


@dataclass(slots=True)
class RequestAccount:
    """What has come to one request."""

    request: Request
    first_token: float
    """Its time, `time.monotonic()`, as the two others."""
    released: float
    overtaken_by: int
    preemptions: Preemptions = field(default_factory=Preemptions)
    """Of all its sequences."""
    num_tokens: int = 0
    num_cached_tokens: int = 0
    answers: list[str] = field(default_factory=list)
    """The text so far of each sequence, where the request log has texts."""

    def add_preemptions(self, ended: Preemptions) -> None:
        """Counts those of a sequence that has ended."""
        had = self.preemptions
        self.preemptions = Preemptions(
            had.count + ended.count,
            had.num_recomputed_tokens + ended.num_recomputed_tokens,
            had.num_swapped_tokens + ended.num_swapped_tokens,
        )

    def timing(self, now: float) -> Timing:
        """Of a request that ends now."""
        arrival = self.request.arrival
        return Timing(
            queued_seconds=round(self.released - arrival, 6),
            first_token_seconds=round(self.first_token - arrival, 6),
            total_seconds=round(now - arrival, 6),
            overtaken_by=self.overtaken_by,
            cached_tokens=self.num_cached_tokens,
            preemptions=self.preemptions.count,
            recomputed_tokens=self.preemptions.num_recomputed_tokens,
            swapped_tokens=self.preemptions.num_swapped_tokens,
        )


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
            if each.preemptions is not None:
                account.add_preemptions(each.preemptions)
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
                queued_seconds=round(account.released - account.request.arrival, 6),
                overtaken_by=account.overtaken_by,
                preemptions=account.preemptions.count,
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
