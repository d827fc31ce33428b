"""From the engine's tokens to the responses of one request."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from fastserve.errors import ErrorCode, RequestError
from fastserve.text.stop_conditions import StopStrings, stop_strings_count, stop_token_ids
from fastserve.text.tokenizer import Tokenizer
from fastserve.types import Outcome, Request, RequestOutput, SequenceOutput, TokenLogprob

_LOWEST_LOGPROB = -9999.0  # JSON has no infinity


class Response(Struct, frozen=True):
    """What has become new since the last response; the lists have one element per sequence (`n`)."""

    text: list[str]
    finish_reason: list[str]
    """"stop" or "length"; "None" until the final response."""
    token_ids: list[list[int]]
    cumulative_logprob: list[float]
    """The sum over all tokens so far."""
    logprobs: list[str]
    """JSON: per new token {token id: {"logprob", "rank", "decoded_token"}}; "null" without `logprobs` in the
    sampling parameters, or if not asked for."""
    num_input_tokens: int
    num_output_tokens: list[int]
    """New ones."""
    prompt_logprobs: str | None
    """JSON as `logprobs`, with null for the first token of the prompt; once, if asked for."""
    final: bool


class OutputProcessor:
    """Makes the responses of one request from what the engine sends for it.

    A sequence that has met a stop string is finished for the client: what the engine still sends for it is
    dropped, and the caller tells the engine to stop it (`newly_stopped`).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._request: Request | None = None
        self._sequences: list[_Sequence] = []
        self._prompt_logprobs: list[list[TokenLogprob]] | None = None
        self.newly_stopped: list[int] = []
        """Sequences that met a stop string in the last `push` and that the engine has not ended itself."""

    def push(self, output: RequestOutput) -> Response | None:
        """The next response, or None where there is nothing to send yet.

        With `stream` a response as soon as there is new text, otherwise only the final one. The first output
        must carry the request. Raises RequestError for a request that failed.
        """
        request = self._start(output)
        self.newly_stopped = []
        for item in output.outputs:
            self._push_sequence(item)
        has_text = any(sequence.text for sequence in self._sequences)
        if not output.final and not (request.output.stream and has_text):
            return None
        return self._response(request, output.final)

    def _start(self, output: RequestOutput) -> Request:
        if self._request is None:
            request = output.request
            if request is None:
                raise RequestError(
                    "the first output of a request came without the request", ErrorCode.INTERNAL
                )
            self._request = request
            self._sequences = [_Sequence(self._tokenizer, request) for _ in range(request.sampling.n)]
        return self._request

    def _push_sequence(self, item: SequenceOutput) -> None:
        sequence = self._sequences[item.index]
        if sequence.outcome is not None:
            return
        sequence.push(item)
        if sequence.outcome is not None and item.outcome is None:
            self.newly_stopped.append(item.index)
        if item.prompt_logprobs is not None:
            self._prompt_logprobs = item.prompt_logprobs

    def _response(self, request: Request, final: bool) -> Response:
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, None
        reasons = [s.outcome.value if final and s.outcome else "None" for s in self._sequences]
        news = [sequence.take() for sequence in self._sequences]
        shows_logprobs = request.output.logprobs and not request.output.null_logprobs
        return Response(
            text=[text for text, _, _ in news],
            finish_reason=reasons,
            token_ids=[token_ids for _, token_ids, _ in news],
            cumulative_logprob=[sequence.cumulative_logprob for sequence in self._sequences],
            logprobs=[self._json(logprobs) if shows_logprobs else "null" for _, _, logprobs in news],
            num_input_tokens=len(request.prompt_token_ids),
            num_output_tokens=[len(token_ids) for _, token_ids, _ in news],
            prompt_logprobs=None if prompt_logprobs is None else self._json(prompt_logprobs),
            final=final,
        )

    def _json(self, positions: list[list[TokenLogprob]]) -> str:
        return msgspec.json.encode([self._position(entries) for entries in positions]).decode()

    def _position(self, entries: list[TokenLogprob]) -> dict[str, Any] | None:
        return {
            str(token_id): {
                "logprob": max(logprob, _LOWEST_LOGPROB),
                "rank": rank,
                "decoded_token": self._tokenizer.token_text(token_id),
            }
            for token_id, logprob, rank in entries
        } or None


class _Sequence:
    """One of the request's `n` sequences: its text so far, and what no response has told yet."""

    def __init__(self, tokenizer: Tokenizer, request: Request) -> None:
        self._params = sampling = request.sampling
        self._detokenizer = tokenizer.new_detokenizer(
            request.prompt_token_ids, skip_special_tokens=sampling.skip_special_tokens
        )
        self._stops = StopStrings(sampling.stop, sampling.include_stop_str_in_output)
        self._hidden_stop_tokens = (
            [] if sampling.include_stop_str_in_output else stop_token_ids(sampling, tokenizer.eos_token_ids)
        )
        self._num_tokens = 0
        self.text = request.prompt if request.output.echo else ""
        self._token_ids: list[int] = []
        self._logprobs: list[list[TokenLogprob]] = []
        self.cumulative_logprob = 0.0
        self.outcome: Outcome | None = None
        """How it ended for the client; None: it goes on."""

    def push(self, output: SequenceOutput) -> None:
        """Takes in the tokens up to one that completes a stop string. Raises RequestError for a failure."""
        _raise_failure(output)
        for position, token_id in enumerate(output.token_ids):
            self._count(token_id, output.logprobs[position] if output.logprobs else [])
            is_last = output.outcome is Outcome.STOP and position == len(output.token_ids) - 1
            if not (is_last and token_id in self._hidden_stop_tokens):
                self._show(self._detokenizer.push([token_id]))
            if self.outcome is not None:
                return
        if output.outcome is not None:
            self._finish(output.outcome)

    def take(self) -> tuple[str, list[int], list[list[TokenLogprob]]]:
        """What is new since the last call: text, token ids, log-probabilities."""
        news = self.text, self._token_ids, self._logprobs
        self.text, self._token_ids, self._logprobs = "", [], []
        return news

    def _count(self, token_id: int, logprobs: list[TokenLogprob]) -> None:
        self._num_tokens += 1
        self._token_ids.append(token_id)
        if logprobs:
            self._logprobs.append(logprobs)
            self.cumulative_logprob += logprobs[0][1]

    def _show(self, text: str) -> None:
        """Adds text up to a stop string."""
        counts = stop_strings_count(self._params, self._num_tokens)
        shown, stopped = self._stops.push(text, may_stop=counts)
        self.text += shown
        if stopped:
            self.outcome = Outcome.STOP

    def _finish(self, outcome: Outcome) -> None:
        self._show(self._detokenizer.flush())
        self.text += self._stops.flush()
        self.outcome = self.outcome or outcome


def _raise_failure(output: SequenceOutput) -> None:
    if output.failure is not None:
        raise RequestError(output.failure.message, ErrorCode(output.failure.code))
    if output.outcome not in (None, Outcome.STOP, Outcome.LENGTH):
        raise RequestError(f"the request ended early: {output.outcome.value}", ErrorCode.CANCELLED)
