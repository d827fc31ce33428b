"""The request log: a line of JSON for each request that has ended, in a file that is rotated.

Several models write to it, each a process: a line goes out in one `write` to the end of the file, and who
finds the file full renames it under a lock.
"""

from __future__ import annotations

import fcntl
import logging
import os
import queue
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import msgspec
from msgspec import Struct

from fastserve.config import Config
from fastserve.errors import ErrorCode, RequestError
from fastserve.service_thread import ServiceThread
from fastserve.types import Request

logger = logging.getLogger(__name__)

MODE = 0o600
KEPT_FILES = 5
"""Full ones, `.1` the newest, beside the one that is written to."""
MAX_QUEUED = 10_000
"""Lines that are not written yet; more are dropped, which the log of the server tells."""


class RequestRecord(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One request. Times are seconds since its arrival."""

    arrival: str
    """UTC, ISO 8601."""
    id: str
    """The client's."""
    uid: str = ""
    """The server's; empty where it was refused before it had one."""
    model: str
    tenant: str = ""
    key: str = ""
    """The id of the client's key."""
    priority: int = 0
    outcome: str
    """As of `fastserve_requests_total`."""
    code: str = ""
    """Of the error, if that is how it ended."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt, found in the prefix cache."""
    output_tokens: int = 0
    queued_seconds: float | None = None
    """Until it left the queue for the first time."""
    overtaken_by: int = 0
    """Requests that came later and left the queue earlier."""
    preemptions: int = 0
    first_token_seconds: float | None = None
    total_seconds: float
    prompt: str | None = None
    """With `log_prompts`."""
    answers: list[str] | None = None
    """With `log_prompts`, of each sequence."""


class RequestLog:
    """Writes records, in a thread of its own. Without a file it does nothing.

    A line that cannot be written is lost, and the server's log says so: no request waits for a disk.
    """

    def __init__(self, path: Path | None, max_bytes: int = 1 << 26, text: Callable[[str], str] | None = None):
        """`max_bytes`: of a file; `text`: what prompts and answers go through; None: they are not written."""
        self._path = path
        self._max_bytes = max_bytes
        self._text = text
        self._records: queue.Queue[RequestRecord | None] = queue.Queue(MAX_QUEUED)
        self._dropped = 0
        self._file = -1
        self._thread = ServiceThread("request-log", self._write_next)
        if path is not None:
            self._thread.start()

    @property
    def is_enabled(self) -> bool:
        """Whether records are written."""
        return self._path is not None

    @property
    def has_text(self) -> bool:
        """Whether prompts and answers are written."""
        return self.is_enabled and self._text is not None

    def write(self, record: RequestRecord) -> None:
        """Takes a record, and returns at once."""
        if not self.is_enabled:
            return
        try:
            self._records.put_nowait(record)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Writes what it has taken, and ends."""
        if self.is_enabled:
            self._records.put(None)
            self._thread.join()

    def _write_next(self) -> bool:
        record = self._records.get()
        if record is None:
            if self._file >= 0:
                os.close(self._file)
            return False
        dropped, self._dropped = self._dropped, 0
        if dropped:
            logger.error("%d lines of the request log were dropped: they came faster than they go", dropped)
        self._append(msgspec.json.encode(self._with_text(record)) + b"\n")
        return True

    def _with_text(self, record: RequestRecord) -> RequestRecord:
        if self._text is None:
            return msgspec.structs.replace(record, prompt=None, answers=None)
        prompt = None if record.prompt is None else self._text(record.prompt)
        answers = None if record.answers is None else [self._text(answer) for answer in record.answers]
        return msgspec.structs.replace(record, prompt=prompt, answers=answers)

    def _append(self, line: bytes) -> None:
        """Raises OSError."""
        assert self._path is not None
        while True:
            if self._file < 0:
                self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, MODE)
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                if self._is_current():
                    size = os.fstat(self._file).st_size
                    if size == 0 or size + len(line) <= self._max_bytes:
                        os.write(self._file, line)
                        return
                    self._rotate()
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)
            os.close(self._file)
            self._file = -1

    def _is_current(self) -> bool:
        """Whether the open file still has the name: another process may have rotated it."""
        try:
            return os.path.samestat(os.stat(str(self._path)), os.fstat(self._file))
        except FileNotFoundError:
            return False

    def _rotate(self) -> None:
        for number in range(KEPT_FILES, 0, -1):
            older = f"{self._path}.{number}"
            newer = f"{self._path}.{number - 1}" if number > 1 else str(self._path)
            if os.path.exists(newer):
                os.replace(newer, older)


def open_request_log(config: Config) -> RequestLog:
    """The request log that the settings ask for. Raises ImportError where masking lacks a library."""
    path = Path(config.request_log) if config.request_log else None
    return RequestLog(path, config.request_log_bytes, _text_filter(config.log_prompts))


def _text_filter(log_prompts: str) -> Callable[[str], str] | None:
    if log_prompts == "none":
        return None
    if log_prompts == "full":
        return str
    from fastserve.access import masking

    masking.check_masking()
    return masking.mask


def record_of(request: Request, outcome: str, now: float) -> RequestRecord:
    """The record of a request that ends now, with what the request itself says; `now` is monotonic."""
    return RequestRecord(
        arrival=wall_clock(request.arrival, now),
        id=request.request_id,
        uid=request.uid,
        model="fastserve",
        tenant=request.tenant,
        key=request.key_id,
        priority=request.priority,
        outcome=outcome,
        prompt_tokens=len(request.prompt_token_ids),
        total_seconds=round(now - request.arrival, 6),
        prompt=request.prompt,
    )


def code_of(error: Exception | None) -> str:
    """The code of what a request has ended with; empty: no error."""
    if error is None:
        return ""
    return (error.code if isinstance(error, RequestError) else ErrorCode.INTERNAL).value


def refused(
    error: Exception | None,
    outcome: str,
    now: float,
    request: Request | None = None,
    request_id: str = "",
    model: str = "fastserve",
) -> RequestRecord:
    """The record of a request that gets no answer but `error`, of which the code alone is kept: its sentence
    may quote what the client has sent. `request`: None where it could not be read."""
    if request is not None:
        return msgspec.structs.replace(record_of(request, outcome, now), code=code_of(error))
    return RequestRecord(
        arrival=wall_clock(now, now),
        id=request_id,
        model=model,
        outcome=outcome,
        code=code_of(error),
        total_seconds=0.0,
    )


def wall_clock(arrival: float, now: float) -> str:
    """UTC of a monotonic time, given that it is `now`."""
    return datetime.fromtimestamp(time.time() - (now - arrival), timezone.utc).isoformat(
        timespec="milliseconds"
    )
