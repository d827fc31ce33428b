"""A request on its way through the worker, and what has come of it since its last response."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import triton_python_backend_utils as pb_utils

from fastserve.triton_server.tensors import FINAL, message_tensor
from fastserve.types import Failure, Outcome, Request, RequestOutput, SequenceOutput

WHOLE_ANSWER_SECONDS = 0.5
"""Between responses for a request that does not stream: they only show whether its client is still there."""


@dataclass(slots=True)
class Relay:
    """Joins the outputs of several steps, so that a request has one response per interval at most."""

    request: Request
    sender: Any
    sequences_left: int
    pending: list[SequenceOutput] = field(default_factory=list)
    last_sent: float | None = None

    def add(self, output: SequenceOutput) -> None:
        self.pending.append(output)
        if output.outcome is not None:
            self.sequences_left -= 1

    @property
    def is_final(self) -> bool:
        return self.sequences_left == 0

    def is_due(self, now: float, stream_interval: float) -> bool:
        """The first output goes at once, so does the last; others wait for the interval to pass."""
        if not self.pending:
            return False
        interval = stream_interval if self.request.output.stream else WHOLE_ANSWER_SECONDS
        return self.last_sent is None or self.is_final or now - self.last_sent >= interval

    def send(self, now: float) -> None:
        # A failure goes alone: `postprocess` answers it with an error, and what came before is to arrive too.
        before = list(itertools.takewhile(lambda output: output.failure is None, self.pending))
        if 0 < len(before) < len(self.pending):
            self._send(before, False, now)
            self.pending = self.pending[len(before) :]
        self._send(self.pending, self.is_final, now)
        self.pending = []

    def _send(self, outputs: list[SequenceOutput], final: bool, now: float) -> None:
        request = self.request if self.last_sent is None else None
        output = RequestOutput(self.request.uid, outputs, request, final)
        response = pb_utils.InferenceResponse(output_tensors=[message_tensor("output", output)])
        self.sender.send(response, flags=FINAL if final else 0)
        self.last_sent = now

    def fail(self, outcome: Outcome, failure: Failure) -> None:
        """Ends the request without an answer."""
        self.sequences_left = 0
        self.pending.append(SequenceOutput(self.request.uid, outcome=outcome, failure=failure))
        self.send(0.0)
