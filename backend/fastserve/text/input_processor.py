"""From what a client sent to a `Request` that can be served, or to an error that says what is wrong."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from fastserve.config import Config
from fastserve.errors import RequestError, invalid
from fastserve.text.chat import CHAT_OPTIONS, parse_chat
from fastserve.text.guide import parse_guide
from fastserve.text.guide_validator import GuideValidator
from fastserve.text.sampling_params import SAMPLING_NAMES, is_sampling_name, parse_sampling_params
from fastserve.text.tokenizer import Tokenizer
from fastserve.text.validation import Vocabulary, coerce, decode_json, decode_text, unknown_name
from fastserve.types import OutputOptions, Request, SamplingParams

logger = logging.getLogger(__name__)

MAX_BYTES_PER_TOKEN = 32
"""A prompt of more bytes than this for each token of the context is refused before it is tokenized."""
_MAX_SAMPLING_BYTES = 1 << 20

_PROMPT_INPUTS = ("text_input", "messages", "prompt_token_ids")
_RETURN_OPTIONS = (
    "finish_reason",
    "cumulative_logprob",
    "logprobs",
    "token_ids",
    "num_input_tokens",
    "num_output_tokens",
    "timing",
)
_OPTION_TYPES: dict[str, Any] = {
    "stream": bool,
    "exclude_input_in_output": bool,
    **{f"return_{name}": bool for name in _RETURN_OPTIONS},
    "priority": int,
    "tenant": Annotated[str, Meta(max_length=128)],
    "expected_output_tokens": int,
}
_INPUT_NAMES = frozenset([*_PROMPT_INPUTS, "sampling_parameters", *_OPTION_TYPES])
_TIMEOUT = Annotated[int, Meta(ge=0)]
_REQUEST_ID = Annotated[str, Meta(max_length=1024)]
# Over HTTP `generate` the fields of the request itself come as parameters too.
_REQUEST_FIELDS = ("id", "timeout")
_PARAMETER_NAMES = frozenset(
    ["sampling_parameters", *_OPTION_TYPES, *_REQUEST_FIELDS, *SAMPLING_NAMES, *CHAT_OPTIONS]
)


class ParsedRequest(NamedTuple):
    """A request of which only the guide, if it has one, is still to be tried out."""

    request: Request
    guide_field: str
    """What a client calls the guide; empty without one."""


class InputProcessor:
    """Validates and tokenizes requests. Threads may share one."""

    def __init__(self, config: Config, tokenizer: Tokenizer, max_model_len: int, vocab_size: int) -> None:
        """`max_model_len`: tokens of prompt and answer together. `vocab_size`: the model's, not the
        tokenizer's; a tokenizer with more tokens than that is warned of here, once."""
        self._config = config
        self._tokenizer = tokenizer
        self._vocabulary = Vocabulary(tokenizer.vocab_size, vocab_size)
        self._guides = GuideValidator(tokenizer)
        self._max_model_len = max_model_len
        low, high = config.priority_range
        self._priority_type: Any = Annotated[int, Meta(ge=low, le=high)]
        if self._vocabulary.mismatch:
            logger.warning(
                "%s: requests that hold one of those beyond are refused, and so is guided decoding",
                self._vocabulary.mismatch,
            )

    def check_guide(self, parsed: ParsedRequest) -> Request:
        """The request, whose guide, if any, compiles; else raises RequestError. It may wait seconds."""
        guide = parsed.request.sampling.guide
        if guide is not None:
            self._guides.validate(guide, parsed.guide_field)
        return parsed.request

    def close(self) -> None:
        """Ends the process that tries out guides."""
        self._guides.close()

    def parse(
        self,
        inputs: Mapping[str, Any],
        parameters: Mapping[str, Any],
        *,
        now: float,
        request_id: str = "",
        timeout_us: int = 0,
    ) -> ParsedRequest:
        """The request that these inputs and request parameters ask for; `check_guide` is yet to come.

        inputs: the input tensors that came, by name, as Python values (None: it did not come). Texts may be
        str or UTF-8 bytes; `messages` and `sampling_parameters` JSON or what it says, decoded;
        `prompt_token_ids` any sequence or array of rank 1.
        parameters: the request parameters; values may be strings. An input wins over a parameter of its
        name, and `sampling_parameters` over parameters with the names of its members.
        now: the arrival, in `time.monotonic()` seconds. timeout_us: microseconds; 0 is none.

        Raises RequestError (INVALID_ARG), which names the field, what came and what is allowed.
        """
        inputs = {name: value for name, value in inputs.items() if value is not None}
        _check_names(inputs, parameters)
        types = _OPTION_TYPES | {"priority": self._priority_type}
        options = {name: _option(name, kind, inputs, parameters) for name, kind in types.items()}
        output = _output_options(options)
        values = _sampling_values(inputs, parameters)
        chat_options = {name: values.pop(name) for name in CHAT_OPTIONS if name in values}
        guide_field, guide = parse_guide(values, self._vocabulary)
        sampling = msgspec.structs.replace(parse_sampling_params(values, self._vocabulary), guide=guide)
        prompt, prompt_token_ids = self._prompt(inputs, chat_options)
        request = Request(
            uid=uuid.uuid4().hex,
            request_id=coerce("id", request_id or parameters.get("id") or "", _REQUEST_ID),
            prompt=prompt,
            prompt_token_ids=prompt_token_ids,
            sampling=self._fitted(sampling, output, len(prompt_token_ids)),
            output=msgspec.structs.replace(output, null_logprobs=sampling.logprobs is None),
            priority=options["priority"] or 0,
            tenant=options["tenant"] or "",
            arrival=now,
            deadline=now + self._time_allowed(timeout_us or parameters.get("timeout") or 0),
            bad_words_token_ids=self._bad_words(sampling.bad_words),
            expected_output_tokens=_expected_output_tokens(options, sampling),
        )
        return ParsedRequest(request, guide_field)

    def _prompt(self, inputs: Mapping[str, Any], chat_options: Mapping[str, Any]) -> tuple[str, list[int]]:
        """The prompt as text and as token ids, of 1 to max_model_len - 1 tokens."""
        given = [name for name in _PROMPT_INPUTS if name in inputs]
        if len(given) != 1:
            came = " and ".join(f"`{name}`" for name in given) or "none of them"
            raise RequestError(
                f"`text_input`: got {came}; allowed: exactly one of {', '.join(_PROMPT_INPUTS)}"
            )
        field = given[0]
        if field != "messages":
            for name, value in chat_options.items():
                if value is not None:
                    raise RequestError(f"`{name}`: got it beside `{field}`; allowed: only beside `messages`")
        if field == "prompt_token_ids":
            token_ids = self._given_token_ids(inputs[field])
            return self._tokenizer.decode(token_ids, skip_special_tokens=False), token_ids
        value = inputs[field]
        text = self._text(field, value) if field == "text_input" else self._chat(value, chat_options)
        token_ids = self._tokenizer.encode(text, special_tokens=field == "text_input")
        self._check_length(field, len(token_ids))
        self._vocabulary.check(field, token_ids)
        return text, token_ids

    def _text(self, field: str, value: object) -> str:
        if isinstance(value, str | bytes):
            self._check_size(field, len(value))
        text = decode_text(field, value)
        if not text:
            raise invalid(field, text, "text that is not empty")
        self._check_size(field, len(text.encode()))
        return text

    def _chat(self, value: object, options: Mapping[str, Any]) -> str:
        messages = decode_json(
            "messages", self._text("messages", value) if isinstance(value, str | bytes) else value
        )
        template = self._tokenizer.chat_template
        chat = parse_chat(messages, options, template.names)
        return self._text("messages", template.render(chat))

    def _given_token_ids(self, value: Any) -> list[int]:
        field = "prompt_token_ids"
        if hasattr(value, "tolist"):
            value = value.tolist()
        allowed = f"a list of {self._vocabulary.allowed}"
        if not isinstance(value, list | tuple):
            raise invalid(field, value, allowed)
        self._check_length(field, len(value))
        token_ids = coerce(field, value, list[int], allowed)
        self._vocabulary.check(field, token_ids)
        return token_ids

    def _check_size(self, field: str, num_bytes: int) -> None:
        limit = self._max_model_len * MAX_BYTES_PER_TOKEN
        if num_bytes > limit:
            raise RequestError(
                f"`{field}`: got {num_bytes} bytes; allowed: at most {limit}, for a context of"
                f" {self._max_model_len} tokens"
            )

    def _check_length(self, field: str, num_tokens: int) -> None:
        if not 1 <= num_tokens < self._max_model_len:
            raise RequestError(
                f"`{field}`: got {num_tokens} tokens; allowed: 1 to {self._max_model_len - 1}, as the context"
                f" is of {self._max_model_len} tokens and the answer needs one"
            )

    def _fitted(self, sampling: SamplingParams, output: OutputOptions, prompt_length: int) -> SamplingParams:
        """The parameters, cut to what remains of the context, with the logprobs that the sum needs."""
        max_tokens = min(sampling.max_tokens, self._max_model_len - prompt_length)
        return msgspec.structs.replace(
            sampling,
            max_tokens=max_tokens,
            min_tokens=min(sampling.min_tokens, max_tokens),
            logprobs=0 if output.cumulative_logprob and sampling.logprobs is None else sampling.logprobs,
        )

    def _bad_words(self, words: list[str]) -> list[list[int]]:
        """Each word's tokens at the beginning of a text and after a space."""
        spellings = [prefix + word.lstrip() for word in words for prefix in ("", " ")]
        encoded = [self._tokenizer.encode(spelling, special_tokens=False) for spelling in spellings]
        for token_ids in encoded:
            self._vocabulary.check("bad_words", token_ids)
        return [list(ids) for ids in dict.fromkeys(map(tuple, encoded)) if ids]

    def _time_allowed(self, timeout: object) -> float:
        """Seconds from arrival to the end; `timeout` in microseconds, 0: only the operator's limit holds."""
        seconds = coerce("timeout", timeout, _TIMEOUT, "microseconds, an integer of at least 0") / 1e6
        limit = self._config.max_request_seconds
        return min(seconds, limit) if seconds else limit


def _check_names(inputs: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    for name in inputs:
        if name not in _INPUT_NAMES:
            raise unknown_name("input", name, _INPUT_NAMES)
    for name in parameters:
        if name in _PROMPT_INPUTS:
            raise RequestError(f"`{name}`: got a request parameter; allowed: an input tensor")
        if name not in _PARAMETER_NAMES and not is_sampling_name(name):
            raise unknown_name("parameter", name, _PARAMETER_NAMES)


def _option(name: str, kind: Any, inputs: Mapping[str, Any], parameters: Mapping[str, Any]) -> Any:
    """An option's value; None where it was not given."""
    value = inputs[name] if name in inputs else parameters.get(name)
    return None if value is None else coerce(name, value, kind)


def _expected_output_tokens(options: Mapping[str, Any], sampling: SamplingParams) -> int | None:
    """The hint, of which the context may hold less."""
    name = "expected_output_tokens"
    value: int | None = options[name]
    if value is not None and not 1 <= value <= sampling.max_tokens:
        raise invalid(name, value, f"an integer from 1 to `max_tokens`, which is {sampling.max_tokens}")
    return value


def _output_options(options: Mapping[str, Any]) -> OutputOptions:
    stream = bool(options["stream"])
    excluded = options["exclude_input_in_output"]
    if stream and excluded is False:
        raise invalid("exclude_input_in_output", False, "true where `stream` is true")
    return OutputOptions(
        stream=stream,
        echo=not (stream if excluded is None else excluded),
        **{name: bool(options[f"return_{name}"]) for name in _RETURN_OPTIONS},
    )


def _sampling_values(inputs: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Every sampling parameter and chat option that came, as it came."""
    values = {
        name: value for name, value in parameters.items() if is_sampling_name(name) or name in CHAT_OPTIONS
    }
    stop = values.get("stop")
    if isinstance(stop, str) and stop.startswith("["):
        values["stop"] = _json_list(stop)
    given = inputs.get("sampling_parameters", parameters.get("sampling_parameters"))
    return values if given is None else values | _sampling_object(given)


def _sampling_object(given: object) -> dict[str, Any]:
    field = "sampling_parameters"
    if isinstance(given, str | bytes) and len(given) > _MAX_SAMPLING_BYTES:
        raise RequestError(f"`{field}`: got {len(given)} bytes; allowed: at most {_MAX_SAMPLING_BYTES}")
    values = decode_json(field, given)
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise invalid(field, values, "a JSON object")
    return dict(values)


def _json_list(text: str) -> Any:
    """Stop strings: the JSON list that a request parameter holds, or else its text itself, as one."""
    try:
        return msgspec.json.decode(text, type=list[str])
    except (ValueError, RecursionError):
        return text
