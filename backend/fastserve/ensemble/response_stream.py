"""A request that a worker serves, and its outputs since its last response."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from fastserve.ensemble.messaging import message_response, send, send_end, send_error, send_final
from fastserve.errors import ErrorCode, RequestError
from fastserve.types import Failure, Outcome, Request, RequestOutput, RequestView, SequenceOutput

logger = logging.getLogger(__name__)

WHOLE_ANSWER_SECONDS = 0.5
"""Between responses for a request that does not stream: they only show whether its client is still there."""


@dataclass(slots=True)
class ResponseStream:
    """Outputs of several steps, joined so that a request has one response per interval at most.

    Whoever takes outputs (`take`) sends them alone, without the lock that guards the rest.
    """

    request: Request
    sender: Any
    sequences_left: int
    replica: int | None = None
    """The engine replica that has it; None: none, it waits in the common queue."""
    released: float = 0.0
    """When it left the queue for the first time."""
    overtaken_by: int = 0
    """See `Released`."""
    preempted: RequestView | None = None
    """While it waits in the common queue, and can run on any replica: what the queue knows of it."""
    has_output: bool = False
    """Whether the worker has computed its prompt."""
    token_ids: list[int] = field(default_factory=list)
    """What was generated, of a request that can move: another replica goes on from there."""
    num_output_tokens: int = 0
    """Of all its sequences."""
    is_sending: bool = False
    """Whether a thread has taken outputs, and sends them."""
    last_sent: float | None = None
    _pending: list[SequenceOutput] = field(default_factory=list)
    _taken: list[SequenceOutput] = field(default_factory=list)
    _ends_with_taken: bool = False
    _ending: tuple[Outcome, Failure | None] | None = None
    """How it ends, if not by its last output."""

    def add(self, output: SequenceOutput) -> None:
        """Takes in the output of one step for one sequence."""
        self._pending.append(output)
        self.has_output = True
        self.num_output_tokens += len(output.token_ids)
        if self.can_move:
            self.token_ids += output.token_ids
        if output.outcome is not None:
            self.sequences_left -= 1

    def end(self, outcome: Outcome, failure: Failure | None) -> None:
        """The request ends here, with a failure or none, behind the tokens that came before it."""
        self._ending = (outcome, failure)
        self.sequences_left = 0

    @property
    def num_tokens(self) -> int:
        """What was computed for it, of the prompt and of the answers."""
        return len(self.request.prompt_token_ids) + self.num_output_tokens if self.has_output else 0

    @property
    def can_move(self) -> bool:
        """Whether another replica may go on with it, given its tokens.

        Not with several sequences, which share a prompt, nor with log-probabilities of the prompt, which the
        worker collects.
        """
        return self.request.sampling.n == 1 and self.request.sampling.prompt_logprobs is None

    @property
    def is_final(self) -> bool:
        """Whether all sequences have ended."""
        return self.sequences_left == 0

    @property
    def has_more(self) -> bool:
        """Whether there is something that nobody has taken."""
        return bool(self._pending) or (self._ending is not None and not self._ends_with_taken)

    def is_due(self, now: float, stream_interval: float) -> bool:
        """Whether to send: the first output at once, the last too, others when the interval has passed."""
        if self.is_sending or not self.has_more:
            return False
        interval = stream_interval if self.request.output.stream else WHOLE_ANSWER_SECONDS
        return self.last_sent is None or self.is_final or now - self.last_sent >= interval

    def take(self) -> None:
        """What is pending is to be sent now, by the caller."""
        self.is_sending = True
        self._taken, self._pending = self._pending, []
        self._ends_with_taken = self.is_final

    def send(self, now: float) -> None:
        """Sends what was taken. Raises what the sender does when there is no shared memory for it."""
        if self._ending is not None:
            self.fail(*self._ending)
        else:
            self._send_taken(now)

    def _send_taken(self, now: float) -> None:
        """A failure goes after the tokens before it, in an output of its own: `postprocess` answers it with
        an error and nothing else."""
        failed = next((i for i, each in enumerate(self._taken) if each.failure is not None), 0)
        if failed:
            tokens, self._taken = self._taken[:failed], self._taken[failed:]
            self._send(tokens, False, now)
        self._send(self._taken, self._ends_with_taken, now)

    def _send(self, outputs: list[SequenceOutput], final: bool, now: float) -> None:
        if self.last_sent is None:
            output = RequestOutput(
                self.request.uid, outputs, self.request, final, self.released, self.overtaken_by
            )
        else:
            output = RequestOutput(self.request.uid, outputs, final=final)
        response = message_response("output", output)
        if final:
            send_final(self.sender, response)
        else:
            send(self.sender, response)
        self.last_sent = now

    def fail(self, outcome: Outcome, failure: Failure | None) -> None:
        """Sends what was taken and the end of the request. Never raises.

        The failure travels as data: an error in a response would overtake the tokens (2.51). Where they
        cannot be sent it goes without them, and where that cannot be sent either, as an error.
        """
        last = SequenceOutput(self.request.uid, outcome=outcome, failure=failure)
        self._ends_with_taken = True
        for taken in ([*self._taken, last], [last]):
            self._taken = taken
            try:
                self._send_taken(0.0)
                return
            except Exception as error:
                logger.error("the failure of request %s could not be sent: %s", self.request.uid, error)
        if failure is not None:
            send_error(self.sender, RequestError(failure.message, ErrorCode(failure.code)))
        else:
            send_end(self.sender)
