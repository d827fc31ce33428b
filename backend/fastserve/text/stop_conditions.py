"""Stop conditions: all that ends a sequence.

by its tokens   `check_stop`, in the engine, after each sampled token
by its text     `StopStrings`, in `OutputProcessor`, after each token that has become text; the engine is told
                by `Cancel(uid, Outcome.STOP, index)`
from outside    a `Cancel` whose outcome is CANCELLED, or a deadline: `has_expired`, before each step;
                `external_stop` is what the client is told

A request that fails (`Outcome.ERROR`) is not stopped: its error says why.
"""

from __future__ import annotations

from collections.abc import Collection

from fastserve.errors import ErrorCode
from fastserve.scheduling.sequence import Sequence
from fastserve.text.aho_corasick import automaton
from fastserve.types import Failure, Outcome, Request, SamplingParams

_EXTERNAL_STOPS = {
    Outcome.CANCELLED: "the request was cancelled",
    Outcome.TIMEOUT: "the request's time was over before it was finished",
}


def stop_token_ids(params: SamplingParams, eos_token_ids: list[int]) -> list[int]:
    """The tokens that end a sequence: the request's own and, unless it ignores them, the model's."""
    return params.stop_token_ids + ([] if params.ignore_eos else eos_token_ids)


def check_stop(
    sequence: Sequence, stop_token_ids: Collection[int], is_guide_complete: bool, max_model_len: int
) -> Outcome | None:
    """How the last token ends the sequence; None: it goes on.

    Before `min_tokens` are generated no stop token counts (the sampler masks them, too). `max_model_len` is
    in tokens of prompt and answer; it ends a sequence as `max_tokens` does.
    """
    params, num_generated = sequence.request.sampling, sequence.num_generated_tokens
    if is_guide_complete or (num_generated >= params.min_tokens and sequence.token_ids[-1] in stop_token_ids):
        return Outcome.STOP
    if num_generated >= params.max_tokens or sequence.num_tokens >= max_model_len:
        return Outcome.LENGTH
    return None


def stop_strings_count(params: SamplingParams, num_generated: int) -> bool:
    """Whether a stop string counts that ends in the text of the last token.

    As in vLLM, none does that ends within the first `min_tokens`.
    """
    return num_generated > params.min_tokens


def has_expired(request: Request, now: float) -> bool:
    """Whether the request's time is over; `now` in `time.monotonic()` seconds."""
    return request.deadline is not None and request.deadline <= now


def external_stop(outcome: Outcome) -> Failure | None:
    """What the client is told of a stop from outside; None for STOP, which is no failure."""
    sentence = _EXTERNAL_STOPS.get(outcome)
    return None if sentence is None else Failure(ErrorCode.CANCELLED.value, sentence)


class StopStrings:
    """Finds the first stop string of one sequence's text and lets out only what cannot belong to one.

    The first is the one that is complete first as the text grows by characters; where several end at the same
    character, the longest. So the result does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: list[str], include_in_output: bool) -> None:
        """`stops`: none of them empty. `include_in_output`: let out the stop string itself too."""
        self._state = automaton(tuple(stops))
        self._include_in_output = include_in_output
        self._held = ""
        self._stopped = False

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, bool]:
        """The text that may be shown now, and whether a stop string has been met.

        `may_stop` false: a stop string that ends in this text is let through. After a stop, everything is
        dropped.
        """
        if self._stopped:
            return "", True
        for position, character in enumerate(text):
            self._state = self._state.step(character)
            if self._state.matched and may_stop:
                self._stopped = True
                shown = self._held + text[: position + 1]
                return (shown if self._include_in_output else shown[: -self._state.matched]), True
        text = self._held + text
        shown_length = len(text) - self._state.depth
        self._held = text[shown_length:]
        return text[:shown_length], False

    def flush(self) -> str:
        """The text held back: no more will come, so it is no stop string."""
        return "" if self._stopped else self._held
