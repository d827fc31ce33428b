"""From the engine's tokens to the responses of one request."""

from __future__ import annotations

from msgspec import Struct

from fastserve.errors import ErrorCode, RequestError
from fastserve.text.logprobs_json import logprobs_json
from fastserve.text.stop_conditions import StopStrings, stop_strings_count, stop_token_ids
from fastserve.text.tokenizer import Tokenizer
from fastserve.types import Outcome, Request, RequestOutput, SequenceOutput, TokenLogprob


class Response(Struct, frozen=True):
    """What has become new since the last response; the lists have one element per sequence (`n`)."""

    text: list[str]
    finish_reason: list[str]
    """"stop" or "length"; "None" until the final response."""
    token_ids: list[list[int]]
    cumulative_logprob: list[float]
    """The sum over all tokens so far."""
    logprobs: list[str]
    """`logprobs_json` of the new tokens; "null" if not asked for, or without `logprobs` in the sampling
    parameters."""
    num_input_tokens: int
    num_output_tokens: list[int]
    """New ones."""
    prompt_logprobs: str | None
    """As `logprobs`, with null for the first token of the prompt; once, if asked for."""
    final: bool


class OutputProcessor:
    """Makes the responses of one request from what the engine sends for it.

    A sequence that has met a stop string is finished for the client: what the engine still sends for it is
    dropped, and the caller tells the engine to stop it (`newly_stopped`).
    """

    def __init__(self, tokenizer: Tokenizer, request: Request) -> None:
        self._tokenizer = tokenizer
        self._request = request
        self._sequences = [_Sequence(tokenizer, request) for _ in range(request.sampling.n)]
        self._prompt_logprobs: list[list[TokenLogprob]] | None = None
        self.newly_stopped: list[int] = []
        """Sequences that met a stop string in the last `push` and that the engine has not ended itself."""

    def push(self, output: RequestOutput) -> Response | None:
        """The next response, or None where there is nothing to send yet.

        With `stream` a response as soon as there is new text, otherwise only the final one. Raises
        RequestError for a request that failed.
        """
        self.newly_stopped = []
        for item in output.outputs:
            self._push_sequence(item)
        has_text = any(sequence.text for sequence in self._sequences)
        if output.final or (self._request.output.stream and has_text):
            return self._response(output.final)
        return None

    def _push_sequence(self, item: SequenceOutput) -> None:
        sequence = self._sequences[item.index]
        if sequence.outcome is not None:
            return
        sequence.push(item)
        if sequence.outcome is not None and item.outcome is None:
            self.newly_stopped.append(item.index)
        if item.prompt_logprobs is not None:
            self._prompt_logprobs = item.prompt_logprobs

    def _response(self, final: bool) -> Response:
        request, token_text = self._request, self._tokenizer.token_text
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, None
        reasons = [s.outcome.value if final and s.outcome else "None" for s in self._sequences]
        news = [sequence.take() for sequence in self._sequences]
        shows_logprobs = request.output.logprobs and not request.output.null_logprobs
        return Response(
            text=[text for text, _, _ in news],
            finish_reason=reasons,
            token_ids=[token_ids for _, token_ids, _ in news],
            cumulative_logprob=[sequence.cumulative_logprob for sequence in self._sequences],
            logprobs=[logprobs_json(each, token_text) if shows_logprobs else "null" for _, _, each in news],
            num_input_tokens=len(request.prompt_token_ids),
            num_output_tokens=[len(token_ids) for _, token_ids, _ in news],
            prompt_logprobs=(None if prompt_logprobs is None else logprobs_json(prompt_logprobs, token_text)),
            final=final,
        )


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
