"""What chat and text completions have in common: the fields of a body, and the options of a call."""

from __future__ import annotations

from typing import Any

from msgspec import Struct
from starlette.datastructures import Headers

from fastserve.openai_api.errors import refusal
from fastserve.openai_api.usage import Usage

SAMPLING_FIELDS = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "logit_bias",
    "bad_words",
    "skip_special_tokens",
)
"""They have one name in OpenAI's API or vLLM's, and in FastServe's sampling parameters, which judge them."""


class StreamOptions(Struct, forbid_unknown_fields=True):
    """`stream_options`."""

    include_usage: bool = False
    """The last chunk has the usage."""
    include_obfuscation: bool = False
    """Without effect: what it pads is hidden from nobody who holds the key."""


class JsonSchema(Struct, forbid_unknown_fields=True):
    """`response_format.json_schema`; the schema is followed strictly, whatever `strict` says."""

    name: str
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct, forbid_unknown_fields=True):
    """`response_format`."""

    type: str
    json_schema: JsonSchema | None = None


class GenerationFields(Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields of both bodies. None: not given, or null, which is OpenAI's default."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    logit_bias: dict[str, float] | None = None
    bad_words: list[str] | None = None
    skip_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None
    user: str | None = None
    tenant: str | None = None
    priority: int | None = None
    deadline_ms: float | None = None
    expected_output_tokens: int | None = None
    return_timing: bool | None = None
    # Of OpenAI's reference, and without effect here.
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None

    def summary(self, usage: Usage) -> dict[str, Any]:
        """What stands beside the choices of a whole answer."""
        return {"usage": usage.json()} | ({"fastserve": usage.timing_json()} if self.return_timing else {})

    def last_summary(self, usage: Usage) -> dict[str, Any] | None:
        """What the last chunk of a stream has, which has no choices; None where nobody asked for it."""
        if not self.include_usage and not self.return_timing:
            return None
        return {
            name: value
            for name, value in self.summary(usage).items()
            if name != "usage" or self.include_usage
        }

    @property
    def include_usage(self) -> bool:
        """Whether the last chunk of a stream has the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


def call_options(body: GenerationFields, headers: Headers, has_keys: bool) -> dict[str, Any]:
    """The options of a client's call that the common fields and the headers ask for; the body wins.

    `has_keys`: a key says the tenant, and `user`, which libraries send unasked, nothing. Raises ApiError.
    """
    if body.stream_options is not None and not body.stream:
        raise refusal("stream_options", "got some; allowed: only where `stream` is true")
    values = {name: getattr(body, name) for name in SAMPLING_FIELDS}
    options = {name: value for name, value in values.items() if value is not None}
    if (guide := _guide(body)) is not None:
        options["structured_outputs"] = guide
    tenant = body.tenant or (None if has_keys else body.user) or headers.get("x-tenant")
    if tenant:
        options["tenant"] = tenant
    priority = body.priority if body.priority is not None else _number(headers, "x-priority", int)
    if priority is not None:
        options["priority"] = _int32("priority", priority)
    if body.expected_output_tokens is not None:
        options["expected_output_tokens"] = _int32("expected_output_tokens", body.expected_output_tokens)
    milliseconds = body.deadline_ms
    if milliseconds is None:
        milliseconds = _number(headers, "x-deadline-ms", float)
    if milliseconds is not None:
        if not 1.0 <= milliseconds <= 1e9:
            raise refusal("deadline_ms", f"got {milliseconds}; allowed: from 1 to 1e9 milliseconds")
        options["timeout"] = milliseconds / 1000
    options["return_timing"] = True  # the usage says how much of the prompt was cached
    options["headers"] = forwarded_headers(headers)
    return options


def forwarded_headers(headers: Headers) -> dict[str, str]:
    """Those that go on with a call: the ensemble's first step asks for a key where keys are on.

    Anthropic's clients send it as `x-api-key`.
    """
    if "authorization" in headers:
        return {"authorization": headers["authorization"]}
    return {"authorization": f"Bearer {headers['x-api-key']}"} if "x-api-key" in headers else {}


def _int32(name: str, value: int) -> int:
    """A value that the tensor can hold; what the server allows, it says itself."""
    if not -(2**31) <= value < 2**31:
        raise refusal(name, f"got {value}; allowed: an integer of 32 bits")
    return value


def _number(headers: Headers, name: str, kind: type[Any]) -> Any:
    text = headers.get(name)
    if text is None:
        return None
    try:
        return kind(text)
    except ValueError as error:
        raise refusal(name, f"got {text[:80]!r}; allowed: a number") from error


def _guide(body: GenerationFields) -> dict[str, Any] | None:
    """`structured_outputs` of the call. Raises ApiError."""
    form = body.response_format
    if form is None or form.type == "text":
        return body.structured_outputs
    if body.structured_outputs is not None:
        raise refusal("response_format", "got `structured_outputs` beside it; allowed: one of them")
    if form.type == "json_object":
        return {"json_object": True}
    if form.type != "json_schema":
        raise refusal("response_format.type", f"got {form.type!r}; allowed: text, json_object, json_schema")
    if form.json_schema is None or form.json_schema.schema is None:
        raise refusal("response_format.json_schema.schema", "missing, but required")
    return {"json": form.json_schema.schema}


GUIDE_NAMES = {
    "structured_outputs.json": "response_format.json_schema.schema",
    "structured_outputs.json_object": "response_format",
    "structured_outputs": "response_format",
}
"""What a client calls the guide that `response_format` became, by FastServe's name."""


def client_names(body: GenerationFields) -> dict[str, str]:
    """What the client calls a field in whose name the server refuses it."""
    names = {"timeout": "deadline_ms"}
    if body.tenant is None and body.user is not None:
        names["tenant"] = "user"
    return names | (GUIDE_NAMES if body.structured_outputs is None else {})
