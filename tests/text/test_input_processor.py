"""Requests: what is valid comes through as said, and what is not is refused by the name of its field."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastserve.config import Config
from fastserve.errors import ErrorCode, RequestError
from fastserve.text.chat import CHAT_OPTIONS, Chat
from fastserve.text.guide import GUIDE_NAMES
from fastserve.text.input_processor import MAX_BYTES_PER_TOKEN, InputProcessor
from fastserve.text.sampling_options import SamplingOptions
from fastserve.text.sampling_params import SAMPLING_NAMES
from fastserve.text.tokenizer import Tokenizer
from fastserve.types import Guide, Request, SamplingParams, decode, encode, view_of

MAX_MODEL_LEN = 64


def test_the_keyword_arguments_are_all_sampling_parameters_and_chat_options() -> None:
    """Those of the embedded API, as type checkers see them."""
    params = {field.name for field in msgspec.structs.fields(SamplingParams)} - {"guide"}
    assert set(SamplingOptions.__annotations__) == params | set(GUIDE_NAMES) | set(CHAT_OPTIONS)
    assert not SamplingOptions.__required_keys__


@pytest.fixture(scope="module")
def input_processor(tokenizer: Tokenizer) -> InputProcessor:
    return InputProcessor(Config(max_request_seconds=60.0), tokenizer, MAX_MODEL_LEN, tokenizer.vocab_size)


def build(
    input_processor: InputProcessor,
    inputs: dict[str, Any] | None = None,
    parameters: dict[str, Any] | None = None,
) -> Request:
    return input_processor.check_guide(
        input_processor.parse({"text_input": "hello"} | (inputs or {}), parameters or {}, now=1000.0)
    )


def sampling(input_processor: InputProcessor, **values: Any) -> SamplingParams:
    """The parameters that come of `values` in the JSON of `sampling_parameters`."""
    return build(input_processor, {"sampling_parameters": json.dumps(values)}).sampling


def refusal(input_processor: InputProcessor, inputs: dict[str, Any], parameters: dict[str, Any]) -> str:
    """What the client is told; the request must be refused as its own fault."""
    with pytest.raises(RequestError) as raised:
        input_processor.check_guide(input_processor.parse(inputs, parameters, now=0.0))
    assert raised.value.code is ErrorCode.INVALID_ARG
    return str(raised.value)


def test_a_plain_request(input_processor: InputProcessor, tokenizer: Tokenizer) -> None:
    request = build(input_processor, {"text_input": "hello €".encode()})
    assert request.prompt == "hello €"
    assert request.prompt_token_ids == tokenizer.encode("hello €")
    assert request.sampling == SamplingParams()
    assert request.output.echo
    assert not request.output.stream
    assert (request.priority, request.tenant, request.request_id) == (0, "", "")
    assert (request.arrival, request.deadline) == (1000.0, 1060.0)


def test_the_operator_sets_the_range_of_priorities(tokenizer: Tokenizer) -> None:
    config = Config(priority_range=(-1, 300))
    processor = InputProcessor(config, tokenizer, MAX_MODEL_LEN, tokenizer.vocab_size)
    assert [build(processor, {"priority": each}).priority for each in (-1, 300)] == [-1, 300]
    for priority in (-2, 301):
        message = refusal(processor, {"text_input": "a", "priority": priority}, {})
        assert message == f"`priority`: got {priority}; allowed: an integer from -1 to 300"


@pytest.mark.parametrize(
    ("max_tokens", "hint", "expected"), [(20, 7, 7), (20, None, 20), (None, 1000, MAX_MODEL_LEN - 5)]
)
def test_a_policy_sees_the_hint_of_the_answers_length(
    input_processor: InputProcessor, max_tokens: int | None, hint: int | None, expected: int
) -> None:
    """Without one, or where the context holds less, the most that there can be."""
    inputs = {
        "text_input": None,
        "prompt_token_ids": [1] * 5,
        "sampling_parameters": json.dumps({"max_tokens": max_tokens}),
        "expected_output_tokens": hint,
    }
    request = build(input_processor, inputs)
    assert request.expected_output_tokens == hint
    assert view_of(request).expected_output_tokens == expected


def test_requests_have_different_uids(input_processor: InputProcessor) -> None:
    assert build(input_processor).uid != build(input_processor).uid


def test_a_chat(input_processor: InputProcessor, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hello"}]
    request = input_processor.check_guide(
        input_processor.parse({"messages": json.dumps(messages)}, {}, now=0.0)
    )
    assert request.prompt == tokenizer.chat_template.render(Chat(messages))
    assert request.prompt_token_ids == tokenizer.encode(request.prompt, special_tokens=False)


@pytest.mark.parametrize("ids", [[5, 6, 7], np.array([5, 6, 7]), (5, 6, 7)], ids=["list", "array", "tuple"])
def test_token_ids(input_processor: InputProcessor, tokenizer: Tokenizer, ids: Any) -> None:
    request = input_processor.check_guide(input_processor.parse({"prompt_token_ids": ids}, {}, now=0.0))
    assert request.prompt_token_ids == [5, 6, 7]
    assert request.prompt == tokenizer.decode([5, 6, 7])


def test_absent_inputs_may_be_none(input_processor: InputProcessor) -> None:
    request = build(input_processor, {"messages": None, "stream": None, "priority": None})
    assert request.prompt == "hello"


@pytest.mark.parametrize("given", [[], ["text_input", "messages"], ["messages", "prompt_token_ids"]])
def test_exactly_one_prompt(input_processor: InputProcessor, given: list[str]) -> None:
    message = refusal(input_processor, dict.fromkeys(given, "x"), {})
    assert "exactly one of text_input, messages, prompt_token_ids" in message
    assert all(f"`{name}`" in message for name in given)


VALUES: dict[str, Any] = {
    "n": 3,
    "max_tokens": 7,
    "min_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.25,
    "top_k": 5,
    "min_p": 0.125,
    "repetition_penalty": 1.5,
    "presence_penalty": -0.5,
    "frequency_penalty": 0.75,
    "seed": -(2**63),
    "stop": ["a", "b"],
    "stop_token_ids": [3, 4],
    "include_stop_str_in_output": True,
    "ignore_eos": True,
    "logprobs": 3,
    "prompt_logprobs": 2,
    "logit_bias": {"4": 1.5},
    "bad_words": ["hell"],
    "skip_special_tokens": False,
}


def test_every_sampling_parameter_is_listed_here() -> None:
    assert {*VALUES, "guided_decoding", "structured_outputs"} == SAMPLING_NAMES


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("form", ["json", "json_string", "parameter", "parameter_string"])
def test_every_sampling_parameter_in_every_form(
    input_processor: InputProcessor, name: str, form: str
) -> None:
    value = VALUES[name]
    as_string = value if isinstance(value, str) else json.dumps(value)
    given = {name: as_string if form.endswith("string") else value}
    expected = {4: 1.5} if name == "logit_bias" else value
    if form.startswith("json"):
        request = build(input_processor, {"sampling_parameters": json.dumps(given)})
        if given == {"stop": as_string}:  # within JSON a string is itself a stop string
            expected = [as_string]
    else:
        request = build(input_processor, parameters=given)
    assert request.sampling == msgspec.structs.replace(SamplingParams(), **{name: expected})


@pytest.mark.parametrize(
    ("value", "stop"),
    [("\n", ["\n"]), ("[", ["["]), ("[1]", ["[1]"]), ('["a", "b"]', ["a", "b"]), ("true", ["true"])],
)
def test_stop_as_a_request_parameter(input_processor: InputProcessor, value: str, stop: list[str]) -> None:
    assert build(input_processor, parameters={"stop": value}).sampling.stop == stop


def test_input_wins_over_parameter_and_json_over_single_parameters(input_processor: InputProcessor) -> None:
    request = build(
        input_processor,
        {"stream": True, "priority": 2, "sampling_parameters": '{"max_tokens": 3}'},
        {
            "stream": "false",
            "priority": "9",
            "max_tokens": "5",
            "top_k": "4",
            "tenant": "a",
            "return_logprobs": "1",
        },
    )
    assert (request.output.stream, request.priority, request.tenant) == (True, 2, "a")
    assert (request.sampling.max_tokens, request.sampling.top_k) == (3, 4)
    assert request.output.logprobs


def test_sampling_parameters_as_a_request_parameter(input_processor: InputProcessor) -> None:
    assert build(input_processor, parameters={"sampling_parameters": '{"top_k": 4}'}).sampling.top_k == 4


def test_null_is_the_default_but_for_max_tokens(
    input_processor: InputProcessor, tokenizer: Tokenizer
) -> None:
    params = sampling(input_processor, temperature=None, stop=None, seed=None, max_tokens=None)
    rest = MAX_MODEL_LEN - len(tokenizer.encode("hello"))
    assert params == msgspec.structs.replace(SamplingParams(), max_tokens=rest)


def test_tokens_are_cut_to_the_context(input_processor: InputProcessor, tokenizer: Tokenizer) -> None:
    rest = MAX_MODEL_LEN - len(tokenizer.encode("hello"))
    params = sampling(input_processor, max_tokens=1000, min_tokens=900)
    assert (params.max_tokens, params.min_tokens) == (rest, rest)


def test_values_that_mean_another(input_processor: InputProcessor, tokenizer: Tokenizer) -> None:
    params = sampling(input_processor, temperature=1e-30, seed=-1, top_k=2**62)
    assert (params.temperature, params.seed, params.top_k) == (0.0, None, tokenizer.vocab_size)


def test_the_sum_of_logprobs_needs_them_and_the_list_asks_for_them(input_processor: InputProcessor) -> None:
    listed = build(input_processor, {"return_logprobs": True})
    assert (listed.sampling.logprobs, listed.output.null_logprobs) == (None, True)
    summed = build(input_processor, {"return_logprobs": True, "return_cumulative_logprob": True})
    assert (summed.sampling.logprobs, summed.output.null_logprobs) == (0, True)
    asked = build(input_processor, {"return_logprobs": True}, {"logprobs": 5})
    assert (asked.sampling.logprobs, asked.output.null_logprobs) == (5, False)


def test_bad_words_are_tokenized_with_and_without_a_space(
    input_processor: InputProcessor, tokenizer: Tokenizer
) -> None:
    request = build(input_processor, parameters={"bad_words": '["hello", "w"]'})
    spellings = ["hello", " hello", "w", " w"]
    assert request.bad_words_token_ids == [tokenizer.encode(s, special_tokens=False) for s in spellings]


@pytest.mark.parametrize(
    ("stream", "exclude", "echo"),
    [(None, None, True), (True, None, False), (True, True, False), (False, True, False)],
)
def test_echo(input_processor: InputProcessor, stream: bool | None, exclude: bool | None, echo: bool) -> None:
    request = build(input_processor, {"stream": stream, "exclude_input_in_output": exclude})
    assert request.output.echo is echo


@pytest.mark.parametrize(
    ("timeout_us", "parameters", "seconds"),
    [(0, {}, 60.0), (2_000_000, {}, 2.0), (0, {"timeout": "3000000"}, 3.0), (10**12, {}, 60.0)],
)
def test_deadline(
    input_processor: InputProcessor, timeout_us: int, parameters: dict[str, Any], seconds: float
) -> None:
    request = input_processor.check_guide(
        input_processor.parse({"text_input": "a"}, parameters, now=5.0, timeout_us=timeout_us)
    )
    assert request.deadline == 5.0 + seconds


def test_request_id(input_processor: InputProcessor) -> None:
    assert (
        input_processor.check_guide(
            input_processor.parse({"text_input": "a"}, {"id": "b"}, now=0.0, request_id="a")
        ).request_id
        == "a"
    )
    assert (
        input_processor.check_guide(
            input_processor.parse({"text_input": "a"}, {"id": "b"}, now=0.0)
        ).request_id
        == "b"
    )


@pytest.mark.parametrize("name", ["guided_decoding", "structured_outputs"])
@pytest.mark.parametrize(
    ("given", "guide"),
    [
        ({"json": {"type": "integer"}}, Guide(json='{"type":"integer"}')),
        ({"json": '{"type": "integer"}', "backend": None}, Guide(json='{"type":"integer"}')),
        ({"json": {"type": "string", "format": "password"}}, Guide(json='{"type":"string"}')),
        ({"json_object": True, "regex": None}, Guide(json='{"type": "object"}')),
        ({"regex": "a+"}, Guide(regex="a+")),
        ({"choice": ["a", "b"], "disable_fallback": False}, Guide(choice=["a", "b"])),
        ({"grammar": 'start: "a"'}, Guide(grammar='start: "a"')),
    ],
)
def test_guides(input_processor: InputProcessor, name: str, given: dict[str, Any], guide: Guide) -> None:
    assert sampling(input_processor, **{name: given}).guide == guide
    assert build(input_processor, parameters={name: json.dumps(given)}).sampling.guide == guide


@pytest.mark.parametrize(
    ("name", "harmless"),
    [
        ("best_of", 1),
        ("best_of", "1"),
        ("use_beam_search", False),
        ("use_beam_search", "false"),
        ("length_penalty", 1.0),
        ("detokenize", True),
        ("truncate_prompt_tokens", None),
        ("logits_processors", None),
    ],
)
def test_what_is_not_served_may_be_at_its_default(
    input_processor: InputProcessor, name: str, harmless: Any
) -> None:
    assert sampling(input_processor, **{name: harmless}) == SamplingParams()


NAN, INFINITY = float("nan"), float("inf")
REFUSED_VALUES: list[tuple[str, Any, str]] = [
    ("n", 0, "an integer from 1 to 64"),
    ("n", True, "an integer from 1 to 64"),
    ("n", "two", "an integer from 1 to 64"),
    ("max_tokens", 0, "an integer of at least 1"),
    ("max_tokens", "1.5", "an integer"),
    ("max_tokens", 2**63, "64 bits"),
    ("min_tokens", 17, "at most `max_tokens`, which is 16"),
    ("temperature", -1, "a number from 0 to 100"),
    ("temperature", True, "a number"),
    ("temperature", NAN, "a number"),
    ("temperature", "nan", "a number"),
    ("temperature", INFINITY, "a number"),
    ("top_p", 0, "a number above 0 and at most 1"),
    ("top_k", -2, "an integer of at least -1"),
    ("min_p", 1.5, "a number from 0 to 1"),
    ("repetition_penalty", 1e-300, "a number from 0.01 to 100"),
    ("presence_penalty", 3, "a number from -2 to 2"),
    ("frequency_penalty", "x", "a number from -2 to 2"),
    ("seed", 2**63, "64 bits"),
    ("seed", 10**5000, "64 bits"),
    ("stop", [""], "1 to 256 characters"),
    ("stop", "", "1 to 256 characters"),
    ("stop", ["x"] * 65, "at most 64 texts"),
    ("stop", ["x" * 257], "1 to 256 characters"),
    ("stop", ["\ud800"], "lone surrogates"),
    ("stop", [1], "texts"),
    ("stop_token_ids", [-1], "token ids from 0 to"),
    ("stop_token_ids", [10**9], "token ids from 0 to"),
    ("stop_token_ids", [True], "token ids from 0 to"),
    ("stop_token_ids", "1,2", "valid JSON"),
    ("stop_token_ids", [1] * 2000, "at most 1024"),
    ("include_stop_str_in_output", "yes", "true or false"),
    ("ignore_eos", 2, "true or false"),
    ("logprobs", 21, "an integer from 0 to 20"),
    ("prompt_logprobs", -1, "an integer from 0 to 20"),
    ("logit_bias", {"1": 101}, "numbers from -100 to 100"),
    ("logit_bias", {"1": NAN}, "numbers from -100 to 100"),
    ("logit_bias", {"x": 1}, "from token ids"),
    ("logit_bias", {"100000": 1}, "token ids from 0 to"),
    ("logit_bias", {"1": 1, "01": 2}, "from token ids"),
    ("logit_bias", [1], "an object"),
    ("logit_bias", {str(i): 1 for i in range(1025)}, "at most 1024"),
    ("bad_words", [""], "1 to 256 characters"),
    ("skip_special_tokens", [], "true or false"),
    ("best_of", 2, "not given or 1"),
    ("use_beam_search", True, "not given or false"),
    ("early_stopping", True, "not given or false"),
    ("length_penalty", 2.0, "not given or 1.0"),
    ("detokenize", False, "not given or true"),
    ("logits_processors", ["x"], "not given"),
    ("truncate_prompt_tokens", 5, "not given"),
    ("spaces_between_special_tokens", False, "not given or true"),
    ("guided_decoding", "{", "valid JSON"),
    ("guided_decoding", [], "an object"),
    ("guided_decoding", {}, "exactly one of"),
    ("guided_decoding", {"regex": "a", "choice": ["a"]}, "exactly one of"),
    ("guided_decoding", {"regexp": "a"}, "did you mean `regex`?"),
    ("guided_decoding", {"regex": ""}, "not empty"),
    ("guided_decoding", {"regex": "("}, "unclosed group"),
    ("guided_decoding", {"regex": "a", "backend": "xgrammar"}, "not given"),
    ("guided_decoding", {"choice": []}, "one or more texts"),
    ("guided_decoding", {"choice": "a"}, "valid JSON"),
    ("guided_decoding", {"json": 5}, "a JSON schema"),
    ("guided_decoding", {"json": {"type": "x"}}, "Invalid type"),
    ("guided_decoding", {"json": {"a": 10**5000}}, "a JSON schema"),
    ("guided_decoding", {"grammar": "start: x"}, "unknown name"),
    ("guide", {"regex": "a"}, "did you mean `guided_decoding`?"),
    ("temprature", 1, "did you mean `temperature`?"),
    ("x" * 10**6, 1, "no such sampling parameter"),
]


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    REFUSED_VALUES,
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_refused_sampling_values(
    input_processor: InputProcessor, name: str, value: Any, allowed: str
) -> None:
    message = refusal(input_processor, {"text_input": "a", "sampling_parameters": {name: value}}, {})
    assert name[:60] in message
    assert allowed in message
    assert len(message) < 2000


def test_several_greedy_answers_are_refused(input_processor: InputProcessor) -> None:
    message = refusal(input_processor, {"text_input": "a"}, {"n": 2, "temperature": 0})
    assert "`n`: got 2; allowed: 1 where `temperature` is 0" in message


def test_two_guides_are_refused(input_processor: InputProcessor) -> None:
    guide = {"regex": "a"}
    values = {"guided_decoding": guide, "structured_outputs": guide}
    message = refusal(input_processor, {"text_input": "a", "sampling_parameters": values}, {})
    assert "`structured_outputs`: got `guided_decoding` beside it" in message


LONG = "x" * (MAX_MODEL_LEN * MAX_BYTES_PER_TOKEN + 1)
REFUSED_INPUTS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("text_input", {"text_input": ""}, {}, "not empty"),
    ("text_input", {"text_input": b"ab\xff"}, {}, "at byte 2; allowed: text in UTF-8"),
    ("text_input", {"text_input": "a\ud800"}, {}, "lone surrogates"),
    ("text_input", {"text_input": 5}, {}, "text"),
    ("text_input", {"text_input": LONG}, {}, f"got {len(LONG)} bytes"),
    ("text_input", {"text_input": "€" * (len(LONG) // 2)}, {}, "bytes; allowed: at most"),
    ("text_input", {"text_input": "x" * MAX_MODEL_LEN}, {}, f"got {MAX_MODEL_LEN + 1} tokens; allowed: 1 to"),
    ("messages", {"messages": "["}, {}, "valid JSON"),
    ("messages", {"messages": "[" * 2000}, {}, "valid JSON"),
    ("messages", {"messages": "[" * 200 + "]" * 200}, {}, "nested deeper"),
    ("messages", {"messages": "[]"}, {}, "one or more objects"),
    ("messages", {"messages": "{}"}, {}, "one or more objects"),
    ("messages", {"messages": '[{"role": "user", "content": "\\ud800"}]'}, {}, "valid JSON"),
    ("messages", {"messages": LONG}, {}, "bytes; allowed"),
    ("prompt_token_ids", {"prompt_token_ids": []}, {}, "got 0 tokens"),
    ("prompt_token_ids", {"prompt_token_ids": [1] * MAX_MODEL_LEN}, {}, f"got {MAX_MODEL_LEN} tokens"),
    ("prompt_token_ids", {"prompt_token_ids": [-1]}, {}, "token ids from 0"),
    ("prompt_token_ids", {"prompt_token_ids": [10**6]}, {}, "token ids from 0"),
    ("prompt_token_ids", {"prompt_token_ids": [True]}, {}, "token ids from 0"),
    ("prompt_token_ids", {"prompt_token_ids": [[1]]}, {}, "token ids from 0"),
    ("prompt_token_ids", {"prompt_token_ids": np.array(3)}, {}, "token ids from 0"),
    ("prompt_token_ids", {"prompt_token_ids": "[1]"}, {}, "token ids from 0"),
    ("stream", {"text_input": "a", "stream": "maybe"}, {}, "true or false"),
    ("exclude_input_in_output", {"text_input": "a", "stream": True}, {"exclude_input_in_output": 0}, "true"),
    ("priority", {"text_input": "a", "priority": 11}, {}, "an integer from -10 to 10"),
    ("priority", {"text_input": "a", "priority": 2**31}, {}, "an integer from -10 to 10"),
    ("priority", {"text_input": "a"}, {"priority": "-11"}, "an integer from -10 to 10"),
    ("priority", {"text_input": "a"}, {"priority": "high"}, "an integer"),
    ("expected_output_tokens", {"text_input": "a", "expected_output_tokens": 0}, {}, "1 to `max_tokens`"),
    ("expected_output_tokens", {"text_input": "a", "expected_output_tokens": 17}, {}, "which is 16"),
    ("expected_output_tokens", {"text_input": "a"}, {"expected_output_tokens": "6", "max_tokens": 5}, "is 5"),
    ("expected_output_tokens", {"text_input": "a", "expected_output_tokens": "many"}, {}, "an integer"),
    ("tenant", {"text_input": "a", "tenant": b"\xff"}, {}, "UTF-8"),
    ("tenant", {"text_input": "a", "tenant": "x" * 129}, {}, "at most 128 characters"),
    ("sampling_parameters", {"text_input": "a", "sampling_parameters": "[1]"}, {}, "a JSON object"),
    ("sampling_parameters", {"text_input": "a", "sampling_parameters": '{"a":' * 5000}, {}, "valid JSON"),
    ("sampling_parameters", {"text_input": "a", "sampling_parameters": {"stop": object()}}, {}, "JSON has"),
    ("sampling_parameters", {"text_input": "a", "sampling_parameters": b"\xff"}, {}, "UTF-8"),
    ("sampling_parameters", {"text_input": "a", "sampling_parameters": '{"top_p": NaN}'}, {}, "valid JSON"),
    ("sampling_parameters", {"text_input": "a", "sampling_parameters": " " * 2**21}, {}, "bytes; allowed"),
    ("timeout", {"text_input": "a"}, {"timeout": "-1"}, "microseconds"),
    ("timeout", {"text_input": "a"}, {"timeout": "soon"}, "microseconds"),
    ("id", {"text_input": "a"}, {"id": "x" * 1025}, "at most 1024"),
    ("messages", {"text_input": "a"}, {"messages": "[]"}, "an input tensor"),
    ("max_token", {"text_input": "a"}, {"max_token": 1}, "did you mean `max_tokens`?"),
    ("text", {"text": "a"}, {}, "no such input"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("field", "inputs", "parameters", "allowed"), REFUSED_INPUTS, ids=lambda v: str(v)[:30]
)
def test_refused_inputs(
    input_processor: InputProcessor,
    field: str,
    inputs: dict[str, Any],
    parameters: dict[str, Any],
    allowed: str,
) -> None:
    message = refusal(input_processor, inputs, parameters)
    assert message.startswith(f"`{field}`: ")
    assert allowed in message
    assert len(message) < 2000


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
GUIDE_VALUES = st.dictionaries(
    st.sampled_from(["json", "regex", "choice", "grammar", "json_object", "backend"]) | st.text(max_size=4),
    JSON_VALUES | st.just({"type": "object"}),
    max_size=2,
)
HOSTILE_TEXTS = ["[" * 10**5, '{"a":' * 10**4, "9" * 5000, "\ud800", b"\xff", "\x00", "NaN", "1e999"]
HOSTILE_OBJECTS = [10**5000, -(2**64), object(), {1, 2}, {1: 2}, np.int64(3), np.array([[1]]), 1j, range(3)]
HOSTILE = st.sampled_from([*HOSTILE_TEXTS, *HOSTILE_OBJECTS])
ANY_VALUE = JSON_VALUES | HOSTILE
OPTION_NAMES = ["stream", "priority", "tenant", "expected_output_tokens"]
NAMES = st.sampled_from([*SAMPLING_NAMES, *OPTION_NAMES, "best_of", "lora_name", "timeout", "id"])
SAMPLING_OBJECTS = st.dictionaries(NAMES | st.text(max_size=12), ANY_VALUE | GUIDE_VALUES, max_size=3)
INPUT_NAMES = [
    "text_input",
    "messages",
    "prompt_token_ids",
    "stream",
    "sampling_parameters",
    "exclude_input_in_output",
]
INPUT_NAMES += ["return_logprobs", "priority", "tenant", "expected_output_tokens"]


@settings(max_examples=400, deadline=None)
@given(
    inputs=st.dictionaries(
        st.sampled_from(INPUT_NAMES) | st.text(max_size=10), ANY_VALUE | SAMPLING_OBJECTS, max_size=3
    ),
    has_prompt=st.booleans(),
    parameters=SAMPLING_OBJECTS,
)
@example(
    inputs={"sampling_parameters": {"guided_decoding": {"json": {"a": 10**5000}}}},
    has_prompt=True,
    parameters={},
)
@example(inputs={"messages": [{"role": "\ud800", "content": ""}]}, has_prompt=False, parameters={})
def test_anything_is_served_or_refused_with_a_sentence(
    input_processor: InputProcessor, inputs: dict[str, Any], has_prompt: bool, parameters: dict[str, Any]
) -> None:
    if has_prompt:
        inputs = inputs | {"text_input": "hello"}
    refused = None
    try:
        request = input_processor.check_guide(input_processor.parse(inputs, parameters, now=0.0))
    except RequestError as error:
        refused = error
    if refused is None:
        assert decode(encode(request), Request) == request
        assert 1 <= len(request.prompt_token_ids) < MAX_MODEL_LEN
        assert len(request.prompt_token_ids) + request.sampling.max_tokens <= MAX_MODEL_LEN
    else:
        message = str(refused)
        assert refused.code is ErrorCode.INVALID_ARG
        assert message.startswith("`")
        assert "allowed:" in message or "does not compile" in message or "refuses them" in message
        assert len(message.encode()) < 3000
