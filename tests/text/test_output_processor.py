"""Responses: the same text however the tokens come, and nothing after the end."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.errors import ErrorCode, RequestError
from fastserve.text.output_processor import OutputProcessor, Response
from fastserve.text.tokenizer import Tokenizer
from fastserve.types import (
    Failure,
    Outcome,
    OutputOptions,
    Request,
    RequestOutput,
    SamplingParams,
    SequenceOutput,
    TokenLogprob,
)

PROMPT = "hello"


def make_request(tokenizer: Tokenizer, options: OutputOptions, **sampling: Any) -> Request:
    return Request(
        uid="u",
        request_id="",
        prompt=PROMPT,
        prompt_token_ids=tokenizer.encode(PROMPT),
        sampling=SamplingParams(**sampling),
        output=options,
        priority=0,
        tenant="",
        arrival=0.0,
        deadline=None,
    )


def output(ids: list[int], index: int = 0, **fields: Any) -> SequenceOutput:
    return SequenceOutput("u", index, ids, **fields)


def step(*outputs: SequenceOutput, final: bool = False) -> RequestOutput:
    return RequestOutput("u", list(outputs), final=final)


def token_id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.backend.token_to_id(token)
    assert found is not None
    return found


def split(ids: list[int], cuts: list[int]) -> list[list[int]]:
    """`ids` cut at the given places (modulo its length)."""
    places = sorted({cut % (len(ids) + 1) for cut in cuts})
    return [ids[start:end] for start, end in zip([0, *places], [*places, len(ids)], strict=True)]


def run(
    tokenizer: Tokenizer, request: Request, pieces: list[list[int]], outcome: Outcome
) -> tuple[list[Response], list[int]]:
    """All responses to one sequence's pieces, and which push (by number) told to stop the sequence."""
    output_processor = OutputProcessor(tokenizer, request)
    responses, stops = [], []
    for number, piece in enumerate(pieces):
        is_last = number == len(pieces) - 1
        item = output(piece, outcome=outcome if is_last else None)
        response = output_processor.push(step(item, final=is_last))
        responses += [] if response is None else [response]
        stops += [number] if output_processor.newly_stopped == [0] else []
    return responses, stops


def test_logprobs_are_null_where_the_sampling_parameters_have_none(tokenizer: Tokenizer) -> None:
    options = OutputOptions(logprobs=True, cumulative_logprob=True, null_logprobs=True)
    request = make_request(tokenizer, options, logprobs=0, n=2)
    items = [output([5], i, outcome=Outcome.LENGTH, logprobs=[[(5, -0.5, 1)]]) for i in range(2)]
    response = OutputProcessor(tokenizer, request).push(step(*items, final=True))
    assert response is not None
    assert response.logprobs == ["null", "null"]
    assert response.cumulative_logprob == [-0.5, -0.5]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("echo", [True, False])
def test_the_answer_keeps_the_space_before_its_first_word(
    tokenizers: dict[str, Tokenizer], stream: bool, echo: bool
) -> None:
    tokenizer = tokenizers["byte_fallback_strip"]
    a, b = token_id(tokenizer, "a"), token_id(tokenizer, "▁b")
    options = OutputOptions(stream=stream, echo=echo, logprobs=True)
    request = msgspec.structs.replace(
        make_request(tokenizer, options), prompt="a", prompt_token_ids=[token_id(tokenizer, "<s>"), a]
    )
    item = output([b], outcome=Outcome.LENGTH, logprobs=[[(b, -1.0, 1)]])
    response = OutputProcessor(tokenizer, request).push(step(item, final=True))
    assert response is not None
    assert response.text == ["a b" if echo else " b"]
    assert json.loads(response.logprobs[0])[0][str(b)]["decoded_token"] == " b"


def test_deltas_joined_are_the_whole_text_however_the_tokens_come(tokenizer: Tokenizer) -> None:
    token_ids = st.lists(st.integers(0, tokenizer.vocab_size), max_size=30)
    letters = st.sampled_from([token_id(tokenizer, letter) for letter in "abell"])

    @settings(max_examples=300, deadline=None)
    @given(
        ids=token_ids | st.lists(letters, max_size=20),
        cuts=st.lists(st.integers(0, 100), max_size=8),
        stop=st.lists(st.text("abell", min_size=1, max_size=3), max_size=2),
        min_tokens=st.integers(0, 4),
        outcome=st.sampled_from([Outcome.STOP, Outcome.LENGTH]),
        switches=st.tuples(st.booleans(), st.booleans()),
    )
    def check(
        ids: list[int],
        cuts: list[int],
        stop: list[str],
        min_tokens: int,
        outcome: Outcome,
        switches: tuple[bool, bool],
    ) -> None:
        sampling = {
            "stop": stop,
            "min_tokens": min_tokens,
            "include_stop_str_in_output": switches[0],
            "skip_special_tokens": switches[1],
        }
        streaming = make_request(tokenizer, OutputOptions(stream=True), **sampling)
        whole = make_request(tokenizer, OutputOptions(), **sampling)
        deltas, stops = run(tokenizer, streaming, split(ids, cuts), outcome)
        (all_at_once,), _ = run(tokenizer, whole, [ids], outcome)
        assert "".join(delta.text[0] for delta in deltas) == all_at_once.text[0]
        assert [token for delta in deltas for token in delta.token_ids[0]] == all_at_once.token_ids[0]
        assert sum(delta.num_output_tokens[0] for delta in deltas) == all_at_once.num_output_tokens[0]
        assert [delta.finish_reason for delta in deltas[:-1]] == [["None"]] * (len(deltas) - 1)
        assert deltas[-1].finish_reason == all_at_once.finish_reason
        assert [delta.final for delta in deltas] == [False] * (len(deltas) - 1) + [True]
        assert all(delta.text[0] for delta in deltas[:-1])
        assert len(stops) <= 1

    check()


def test_without_a_stop_the_text_is_the_decoded_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello wé", special_tokens=False)
    (response,), stops = run(tokenizer, make_request(tokenizer, OutputOptions()), [ids], Outcome.LENGTH)
    assert response == Response(
        text=["hello wé"],
        finish_reason=["length"],
        token_ids=[ids],
        cumulative_logprob=[0.0],
        logprobs=["null"],
        num_input_tokens=len(tokenizer.encode(PROMPT)),
        num_output_tokens=[len(ids)],
        prompt_logprobs=None,
        final=True,
    )
    assert stops == []


def test_echo_begins_with_the_prompt(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" w", special_tokens=False)
    (response,), _ = run(tokenizer, make_request(tokenizer, OutputOptions(echo=True)), [ids], Outcome.LENGTH)
    assert response.text == ["hello w"]


def test_no_response_without_new_text(tokenizer: Tokenizer) -> None:
    first, second, third = tokenizer.encode("€", special_tokens=False)
    request = make_request(tokenizer, OutputOptions(stream=True))
    output_processor = OutputProcessor(tokenizer, request)
    assert output_processor.push(step(output([first]))) is None
    assert output_processor.push(step(output([second]))) is None
    response = output_processor.push(step(output([third])))
    assert response is not None
    assert (response.text, response.token_ids) == (["€"], [[first, second, third]])
    assert response.finish_reason == ["None"]
    last = output_processor.push(step(output([first], outcome=Outcome.LENGTH), final=True))
    assert last is not None
    assert (last.text, last.finish_reason, last.final) == (["\N{REPLACEMENT CHARACTER}"], ["length"], True)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_ends_the_sequence_at_its_token(tokenizer: Tokenizer, stream: bool) -> None:
    ids = tokenizer.encode("ab\nUser: x", special_tokens=False)
    at = tokenizer.encode("ab\nUser:", special_tokens=False)
    request = make_request(
        tokenizer, OutputOptions(stream=stream, logprobs=True), stop=["\nUser:"], logprobs=0
    )
    output_processor = OutputProcessor(tokenizer, request)
    logprobs: list[list[TokenLogprob]] = [[(token, -0.5, 1)] for token in ids]
    first = output_processor.push(step(output(ids, logprobs=logprobs)))
    assert output_processor.newly_stopped == [0]
    second = output_processor.push(step(output(ids, logprobs=logprobs)))
    assert output_processor.newly_stopped == []
    last = output_processor.push(step(output([], outcome=Outcome.STOP), final=True))
    assert second is None
    assert last is not None
    assert last.finish_reason == ["stop"]
    assert last.cumulative_logprob == [-0.5 * len(at)]
    told = last if first is None else first
    assert (told.text, told.token_ids, told.num_output_tokens) == (["ab"], [at], [len(at)])
    assert len(json.loads(told.logprobs[0])) == len(at)
    if stream:
        assert (last.text, last.token_ids, last.logprobs) == ([""], [[]], ["[]"])


def test_an_end_that_the_engine_knows_of_needs_no_cancel(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ab", special_tokens=False)
    (response,), stops = run(
        tokenizer, make_request(tokenizer, OutputOptions(), stop=["b"]), [ids], Outcome.LENGTH
    )
    assert (response.text, response.finish_reason) == (["a"], ["stop"])
    assert stops == []


def test_held_back_beginning_of_a_stop_string_comes_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("abc", special_tokens=False)
    request = make_request(tokenizer, OutputOptions(stream=True), stop=["bcd"])
    responses, _ = run(tokenizer, request, [ids, []], Outcome.LENGTH)
    assert [response.text for response in responses] == [["a"], ["bc"]]


@pytest.mark.parametrize(("min_tokens", "text"), [(0, "a"), (1, "a"), (2, "aba"), (4, "abab")])
def test_no_stop_string_counts_within_min_tokens(tokenizer: Tokenizer, min_tokens: int, text: str) -> None:
    ids = [token_id(tokenizer, letter) for letter in "abab"]
    request = make_request(tokenizer, OutputOptions(), stop=["b"], min_tokens=min_tokens)
    (response,), _ = run(tokenizer, request, [ids], Outcome.LENGTH)
    assert response.text == [text]


END = "</s>"


@pytest.mark.parametrize(
    ("stop_token", "sampling", "outcome", "text"),
    [
        (END, {}, Outcome.STOP, "ab"),
        (END, {"skip_special_tokens": False}, Outcome.STOP, "ab"),
        (END, {"skip_special_tokens": False, "include_stop_str_in_output": True}, Outcome.STOP, "ab</s>"),
        (END, {"skip_special_tokens": False, "ignore_eos": True}, Outcome.LENGTH, "ab</s>"),
        ("w", {"stop_token_ids": True}, Outcome.STOP, "ab"),
        ("w", {"stop_token_ids": True, "include_stop_str_in_output": True}, Outcome.STOP, "abw"),
        ("w", {"stop_token_ids": True}, Outcome.LENGTH, "abw"),
        ("w", {}, Outcome.STOP, "abw"),  # a guide is complete
    ],
)
def test_token_that_ends_the_sequence(
    tokenizer: Tokenizer, stop_token: str, sampling: dict[str, Any], outcome: Outcome, text: str
) -> None:
    last = token_id(tokenizer, stop_token)
    ids = [*tokenizer.encode("ab", special_tokens=False), last]
    if sampling.get("stop_token_ids"):
        sampling = sampling | {"stop_token_ids": [last]}
    (response,), _ = run(tokenizer, make_request(tokenizer, OutputOptions(), **sampling), [ids], outcome)
    assert (response.text, response.token_ids) == ([text], [ids])
    assert response.finish_reason == [outcome.value]


def test_logprobs_in_the_shape_of_the_vllm_backend(tokenizer: Tokenizer) -> None:
    a, b = tokenizer.encode("ab", special_tokens=False)
    request = make_request(
        tokenizer, OutputOptions(stream=True, logprobs=True), logprobs=1, prompt_logprobs=0
    )
    output_processor = OutputProcessor(tokenizer, request)
    first_output = output(
        [a],
        logprobs=[[(a, -1.5, 2), (b, -0.5, 1)]],
        prompt_logprobs=[[], [(b, float("-inf"), 9)]],
    )
    first = output_processor.push(step(first_output))
    last_output = output([b], logprobs=[[(b, -0.25, 1), (b, -0.25, 1)]], outcome=Outcome.LENGTH)
    last = output_processor.push(step(last_output, final=True))
    assert first is not None
    assert last is not None
    assert json.loads(first.logprobs[0]) == [
        {
            str(a): {"logprob": -1.5, "rank": 2, "decoded_token": "a"},
            str(b): {"logprob": -0.5, "rank": 1, "decoded_token": "b"},
        }
    ]
    assert json.loads(last.logprobs[0]) == [{str(b): {"logprob": -0.25, "rank": 1, "decoded_token": "b"}}]
    assert [response.cumulative_logprob for response in (first, last)] == [[-1.5], [-1.75]]
    assert first.prompt_logprobs is not None
    assert json.loads(first.prompt_logprobs) == [
        None,
        {str(b): {"logprob": -9999.0, "rank": 9, "decoded_token": "b"}},
    ]
    assert last.prompt_logprobs is None


def test_several_sequences(tokenizer: Tokenizer) -> None:
    a, b = tokenizer.encode("ab", special_tokens=False)
    request = make_request(tokenizer, OutputOptions(stream=True), n=2, stop=["b"])
    output_processor = OutputProcessor(tokenizer, request)
    first = output_processor.push(step(output([a, b], index=1)))
    assert first is not None
    assert (first.text, first.finish_reason) == (["", "a"], ["None", "None"])
    assert output_processor.newly_stopped == [1]
    second = output_processor.push(step(output([a]), output([a], index=1)))
    assert second is not None
    assert (second.text, second.token_ids) == (["a", ""], [[a], []])
    last = output_processor.push(step(output([a], outcome=Outcome.LENGTH), final=True))
    assert last is not None
    assert (last.text, last.finish_reason) == (["a", ""], ["length", "stop"])


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({"failure": Failure("UNAVAILABLE", "the worker died")}, ErrorCode.UNAVAILABLE, "the worker died"),
        ({"failure": Failure("INTERNAL", "x"), "outcome": Outcome.ERROR}, ErrorCode.INTERNAL, "x"),
        ({"outcome": Outcome.TIMEOUT}, ErrorCode.CANCELLED, "timeout"),
        ({"outcome": Outcome.CANCELLED}, ErrorCode.CANCELLED, "cancelled"),
    ],
)
def test_failures_are_raised(
    tokenizer: Tokenizer, fields: dict[str, Any], code: ErrorCode, message: str
) -> None:
    request = make_request(tokenizer, OutputOptions(stream=True))
    with pytest.raises(RequestError, match=message) as raised:
        OutputProcessor(tokenizer, request).push(step(output([], **fields), final=True))
    assert raised.value.code is code


def test_failure_of_a_sequence_that_has_stopped_is_no_failure(tokenizer: Tokenizer) -> None:
    output_processor = OutputProcessor(tokenizer, make_request(tokenizer, OutputOptions(), stop=["b"]))
    output_processor.push(step(output(tokenizer.encode("ab", special_tokens=False))))
    response = output_processor.push(step(output([], failure=Failure("INTERNAL", "x")), final=True))
    assert response is not None
    assert (response.text, response.finish_reason) == (["a"], ["stop"])


def test_responses_cross_processes(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ab", special_tokens=False)
    (response,), _ = run(tokenizer, make_request(tokenizer, OutputOptions()), [ids], Outcome.LENGTH)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(response), type=Response) == response
