"""The requests that the workers serve, and the threads that send their responses."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

from fastserve.ensemble.response_interval import ResponseInterval
from fastserve.ensemble.response_stream import ResponseStream
from fastserve.errors import ErrorCode
from fastserve.types import Failure, Outcome

logger = logging.getLogger(__name__)


class ResponseStreams:
    """Streams by uid. One thread at a time sends for a stream: that which has taken its outputs.

    The thread that reads a worker's pipe sends for its requests; for one that has moved, two do by turns.
    The lock guards all but the sending.
    """

    def __init__(
        self,
        lock: threading.RLock,
        interval: ResponseInterval,
        on_unsent: Callable[[ResponseStream], None],
        on_finished: Callable[[ResponseStream], None],
    ) -> None:
        """Under the lock are called `on_unsent` for a stream whose response could not be sent: it has ended
        for its client, and `on_finished` once for each that is forgotten."""
        self._lock = lock
        self._interval = interval
        self._on_unsent = on_unsent
        self._on_finished = on_finished
        self._streams: dict[str, ResponseStream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def __iter__(self) -> Iterator[ResponseStream]:
        return iter(list(self._streams.values()))

    def __contains__(self, uid: str) -> bool:
        return uid in self._streams

    def add(self, stream: ResponseStream) -> None:
        """Takes a request in."""
        self._streams[stream.request.uid] = stream

    def remove(self, stream: ResponseStream) -> None:
        """Forgets a request: nothing that comes of it is for anybody."""
        if self._streams.pop(stream.request.uid, None) is not None:
            self._on_finished(stream)

    def get(self, uid: str) -> ResponseStream | None:
        """The stream of that request, if it has not ended."""
        return self._streams.get(uid)

    def send_due(self, now: float) -> None:
        """Sends the responses that are due, without the lock."""
        with self._lock:
            interval = self._interval.seconds(len(self._streams))
            due = [stream for stream in self._streams.values() if stream.is_due(now, interval)]
            for stream in due:
                self._take(stream)
        for stream in due:
            self._send(stream, now)

    def end(self, stream: ResponseStream, outcome: Outcome, failure: Failure | None) -> None:
        """Ends a request from outside, without the lock, and forgets it. Never raises."""
        with self._lock:
            stream.end(outcome, failure)
            self.remove(stream)
            if stream.is_sending:  # then that thread sends the end too
                return
            stream.take()
        self._send(stream, 0.0)

    def _take(self, stream: ResponseStream) -> None:
        stream.take()
        if stream.is_final:
            self.remove(stream)

    def _send(self, stream: ResponseStream, now: float) -> None:
        """Sends what was taken, and the end if it comes meanwhile. What cannot be sent ends that request."""
        while stream.is_sending:
            try:
                stream.send(now)
            except Exception as error:
                logger.exception("a response of request %s could not be sent", stream.request.uid)
                with self._lock:
                    if stream.request.uid in self:
                        self.remove(stream)
                        self._on_unsent(stream)
                message = f"the answer could not be sent: {error}"
                stream.fail(Outcome.ERROR, Failure(ErrorCode.UNAVAILABLE.value, message))
                return
            with self._lock:
                stream.is_sending = False
                if stream.is_final and stream.has_more:
                    self._take(stream)
