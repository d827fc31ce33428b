"""The model `postprocess` over a fake server, with the default model's tokenizer."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.access.test_masking import left_over, synthetic_secrets

from fastserve.access.request_log import RequestLog
from fastserve.checkpoints.model_files import ModelFiles
from fastserve.config import CONFIG_VARIABLE
from fastserve.ensemble.control_messages import HealthReport
from fastserve.text.tokenizer import Tokenizer, load_tokenizer
from fastserve.types import (
    Cancel,
    Failure,
    Outcome,
    OutputOptions,
    Preemptions,
    Request,
    RequestOutput,
    SamplingParams,
    SequenceOutput,
)

LOST = Failure("UNAVAILABLE", "the engine's worker ended")


class Postprocess:
    """The model, and outputs of the engine for it."""

    def __init__(self, pb_utils: Any, model: Any) -> None:
        self.pb_utils, self.model = pb_utils, model

    def message(self, output: RequestOutput) -> Any:
        from fastserve.ensemble.messaging import message_tensor

        return self.pb_utils.InferenceRequest(inputs=[message_tensor("output", output)])

    def outputs(self, *outputs: RequestOutput) -> list[Any]:
        """Sends them in one batch; their senders."""
        batch = [self.message(output) for output in outputs]
        self.model.execute(batch)
        return [each.sender for each in batch]

    def stops(self, count: int) -> list[Cancel]:
        """The stops that the engine was sent, when there are so many."""
        from fastserve.ensemble.messaging import message_of

        server = self.pb_utils.server
        server.wait(lambda each: len(each.requests) >= count)
        return [message_of(request, "stop", Cancel) for request in server.requests]  # type: ignore[misc]


@pytest.fixture(scope="module")
def tokenizer(default_model: ModelFiles) -> Tokenizer:
    return load_tokenizer(default_model)


@pytest.fixture
def postprocess(
    pb_utils: Any, monkeypatch: pytest.MonkeyPatch, default_model: ModelFiles, tokenizer: Tokenizer
) -> Iterator[Postprocess]:
    from fastserve.ensemble import postprocess as module

    monkeypatch.setattr(module, "locate", lambda model: default_model)
    monkeypatch.setattr(module, "load_tokenizer", lambda files: tokenizer)
    model = module.PostprocessModel()
    model.initialize({})
    yield Postprocess(pb_utils, model)
    model.finalize()


def a_request(uid: str, stream: bool = True, tenant: str = "", **sampling: Any) -> Request:
    output = OutputOptions(stream=stream)
    return Request(uid, "", "", [1, 2, 3], SamplingParams(**sampling), output, 0, tenant, 0.0, None)


def first(request: Request, *token_ids: int) -> RequestOutput:
    """Of a request that goes on."""
    return RequestOutput(request.uid, [SequenceOutput(request.uid, token_ids=list(token_ids))], request)


def last(uid: str, *token_ids: int) -> RequestOutput:
    output = SequenceOutput(uid, token_ids=list(token_ids), outcome=Outcome.LENGTH)
    return RequestOutput(uid, [output], final=True)


def text(sender: Any) -> str:
    return "".join(array[0].decode() for array in sender.outputs("text_output"))


def words(postprocess: Postprocess, text: str) -> list[int]:
    token_ids: list[int] = postprocess.model._tokenizer.encode(text)
    return token_ids


@pytest.fixture
def request_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of models that are started later in the test, which write masked texts into it."""
    path, settings = tmp_path / "requests.jsonl", tmp_path / "config.json"
    settings.write_text(json.dumps({"request_log": str(path), "log_prompts": "masked"}))
    monkeypatch.setenv(CONFIG_VARIABLE, str(settings))
    return path


def test_of_200_secrets_in_prompts_and_answers_95_in_100_are_masked_in_the_request_log(
    request_log: Path, postprocess: Postprocess
) -> None:
    secrets = [secret for values in synthetic_secrets().values() for secret in values]
    for number, secret in enumerate(secrets):
        uid, token_ids = f"r{number}", words(postprocess, f"It is {secret}.")
        request = msgspec.structs.replace(a_request(uid), prompt=f"My secret is {secret}, keep it")
        half = len(token_ids) // 2  # the answer comes in two pieces, of which neither has all of it
        postprocess.outputs(first(request, *token_ids[:half]), last(uid, *token_ids[half:]))
    postprocess.model._accounts.request_log.close()
    postprocess.model._accounts.request_log = RequestLog(None)
    records = [json.loads(line) for line in request_log.read_text().splitlines()]
    assert [each["uid"] for each in records] == [f"r{number}" for number in range(200)]
    for field in ("prompt", "answers"):
        texts = [str(each[field]) for each in records]
        assert all("secret is" in text or "It is" in text for text in texts)
        missed = [text for text, secret in zip(texts, secrets, strict=True) if left_over(secret, text)]
        assert len(missed) <= 10, missed


@pytest.mark.parametrize(
    ("ending", "outcome", "code"),
    [
        (SequenceOutput("a", token_ids=[1, 2], outcome=Outcome.STOP), "stop", None),
        (SequenceOutput("a", outcome=Outcome.ERROR, failure=LOST), "error", "UNAVAILABLE"),
        (
            SequenceOutput("a", outcome=Outcome.CANCELLED, failure=Failure("CANCELLED", "x")),
            "cancelled",
            "CANCELLED",
        ),
    ],
)
def test_each_request_is_one_line_of_the_request_log_however_it_ends(
    request_log: Path, postprocess: Postprocess, ending: SequenceOutput, outcome: str, code: str | None
) -> None:
    begins = SequenceOutput("a", token_ids=[5], num_cached_tokens=2)
    postprocess.outputs(
        RequestOutput("a", [begins], a_request("a", tenant="t")), RequestOutput("a", [ending], final=True)
    )
    postprocess.model._accounts.request_log.close()
    postprocess.model._accounts.request_log = RequestLog(None)
    [record] = [json.loads(line) for line in request_log.read_text().splitlines()]
    assert (record["outcome"], record.get("code"), record["tenant"]) == (outcome, code, "t")
    assert (record["prompt_tokens"], record["cached_tokens"]) == (3, 2)
    assert record["output_tokens"] == 1 + len(ending.token_ids)


def test_tokens_become_text(postprocess: Postprocess) -> None:
    hello, world = words(postprocess, "Hello world")
    senders = postprocess.outputs(first(a_request("a"), hello), last("a", world))
    assert [text(sender) for sender in senders] == ["Hello", " world"]
    assert all(sender.is_final for sender in senders)


def test_all_tokens_before_a_failure_arrive_since_each_output_has_one_answer(
    postprocess: Postprocess,
) -> None:
    hello, world = words(postprocess, "Hello world")
    failure = SequenceOutput("a", outcome=Outcome.ERROR, failure=LOST)
    tokens, error = postprocess.outputs(
        first(a_request("a"), hello, world), RequestOutput("a", [failure], final=True)
    )
    assert (text(tokens), tokens.is_final, tokens.error) == ("Hello world", True, None)
    assert (error.error.message(), error.is_final) == ("UNAVAILABLE: the engine's worker ended", True)
    assert len(error.responses) == 1
    assert postprocess.pb_utils.server.metric("fastserve_requests_total", outcome="error") == 1


def test_a_message_that_cannot_be_read_fails_alone(postprocess: Postprocess) -> None:
    from fastserve.ensemble.message_signature import sign
    from fastserve.ensemble.messaging import strings

    (hello,) = words(postprocess, "Hello")
    bad = postprocess.pb_utils.InferenceRequest(inputs=[strings("output", [sign("output", b"\xc1")])])
    empty = postprocess.pb_utils.InferenceRequest()
    good = postprocess.message(first(a_request("a"), hello))
    postprocess.model.execute([bad, empty, good])
    assert "could not be made: DecodeError" in bad.sender.error.message()
    assert "`output`" in empty.sender.error.message()
    assert (bad.sender.is_final, empty.sender.is_final, text(good.sender)) == (True, True, "Hello")


@pytest.mark.parametrize("memory_is_short", [True, False])
def test_a_response_that_cannot_be_sent_fails_its_request_with_the_last_output(
    postprocess: Postprocess, request: pytest.FixtureRequest, memory_is_short: bool
) -> None:
    """Not before: 2.51 never lets go of an ensemble's request that fails while the engine still serves it."""
    if memory_is_short:
        request.getfixturevalue("short_shared_memory")
    hello, world = words(postprocess, "Hello world")
    batch = [postprocess.message(first(a_request(uid), hello)) for uid in ("a", "b")]
    batch[0].sender.fail_next()
    postprocess.model.execute(batch)
    assert (batch[0].sender.responses, text(batch[1].sender)) == ([], "Hello")
    assert batch[0].sender.is_final == memory_is_short  # else the sender takes no more
    assert postprocess.stops(1) == [Cancel("a", Outcome.CANCELLED)]
    (dropped,) = postprocess.outputs(RequestOutput("a", [SequenceOutput("a", token_ids=[world])]))
    assert (dropped.responses, dropped.is_final) == ([], True)
    error, goes_on = postprocess.outputs(last("a", world), last("b", world))
    expected = "UNAVAILABLE: the answer could not be sent: no shared memory"
    assert (error.error.message(), error.is_final, text(goes_on)) == (expected, True, " world")
    server = postprocess.pb_utils.server
    assert server.metric("fastserve_requests_total", outcome="error") == 1
    assert server.metric("fastserve_requests_total", outcome="length") == 1


def test_metrics_that_fail_hurt_nobody(postprocess: Postprocess) -> None:
    server = postprocess.pb_utils.server
    server.failing_metrics |= {"fastserve_generation_tokens_total", "fastserve_time_to_first_token_seconds"}
    hello, world = words(postprocess, "Hello world")
    (sender,) = postprocess.outputs(first(a_request("a"), hello))
    server.failing_metrics.clear()
    postprocess.outputs(last("a", world))
    assert text(sender) == "Hello"
    assert server.metric("fastserve_generation_tokens_total", tenant="") == 2  # the first was owed


def test_a_stop_that_could_not_be_told_is_told_again(postprocess: Postprocess) -> None:
    failures = [ValueError("broken"), postprocess.pb_utils.TritonModelException("no shared memory")]

    def answer(request: Any) -> Any:
        if failures:
            raise failures.pop()
        return []

    postprocess.pb_utils.server.answer = answer
    hello, world = words(postprocess, "Hello world")
    postprocess.outputs(first(a_request("a", stop=["Hello"]), hello, world))
    assert postprocess.stops(3) == [Cancel("a", Outcome.STOP, 0)] * 3
    postprocess.outputs(first(a_request("b", stop=["Hello"]), hello, world))
    assert postprocess.stops(4)[-1] == Cancel("b", Outcome.STOP, 0)


def test_an_engine_that_can_never_be_told_makes_the_server_unready(postprocess: Postprocess) -> None:
    from fastserve.ensemble.messaging import message_of

    reports: list[HealthReport] = []

    def answer(request: Any) -> Any:
        health = message_of(request, "health", HealthReport)
        if health is None and not reports:
            raise postprocess.pb_utils.TritonModelException("no shared memory")
        if health is not None:
            reports.append(health)
        return []

    postprocess.pb_utils.server.answer = answer
    hello, world = words(postprocess, "Hello world")
    postprocess.outputs(first(a_request("a", stop=["Hello"]), hello, world))
    postprocess.pb_utils.server.wait(lambda each: len(each.requests) == 8)
    problem = "the thread `stops` keeps failing: RequestError: engine: no shared memory"
    assert reports == [HealthReport("postprocess", problem), HealthReport("postprocess", None)]


def test_a_request_whose_last_output_never_came_is_forgotten(postprocess: Postprocess) -> None:
    (hello,) = words(postprocess, "Hello")
    postprocess.outputs(first(msgspec.structs.replace(a_request("old"), deadline=1.0), hello))
    postprocess.model._next_sweep = 0.0
    postprocess.outputs(first(a_request("new"), hello))
    assert list(postprocess.model._states) == ["new"]


def test_tokens_are_counted_by_tenant_under_a_bounded_number_of_labels(postprocess: Postprocess) -> None:
    hello, world = words(postprocess, "Hello world")
    for number in range(70):
        uid = str(number)
        postprocess.outputs(first(a_request(uid, tenant=f"tenant {number}"), hello), last(uid, world))
    metric = postprocess.pb_utils.server.metric
    first_tokens = postprocess.pb_utils.server.metrics["fastserve_tenant_time_to_first_token_seconds"]
    seen = {each.labels["tenant"]: len(each.observed) for each in first_tokens}
    assert (len(seen), seen["tenant 0"], seen["other"]) == (65, 1, 6)
    for name, tokens in (("generation", 2), ("prompt", 3)):
        assert metric(f"fastserve_{name}_tokens_total", tenant="tenant 0") == tokens
        assert metric(f"fastserve_{name}_tokens_total", tenant="tenant 69") == 0
        assert metric(f"fastserve_{name}_tokens_total", tenant="other") == 6 * tokens


def test_a_last_response_says_why_it_took_as_long_as_it_did(postprocess: Postprocess) -> None:
    request = msgspec.structs.replace(
        a_request("a", n=2), output=OutputOptions(stream=True, timing=True), arrival=time.monotonic() - 3.0
    )
    cached = SequenceOutput("a", token_ids=words(postprocess, "x"), num_cached_tokens=2)
    begun = RequestOutput("a", [cached], request, released=request.arrival + 1.0, overtaken_by=5)
    ends = [
        SequenceOutput("a", index, outcome=Outcome.LENGTH, preemptions=Preemptions(1, 10, 100))
        for index in (0, 1)
    ]
    one, other = postprocess.outputs(begun, RequestOutput("a", ends, final=True))
    assert one.outputs("timing") == []
    [[said]] = other.outputs("timing")
    timing = json.loads(said)
    assert timing.pop("first_token_seconds") >= 3.0
    assert timing.pop("total_seconds") >= 3.0
    assert timing == {
        "queued_seconds": 1.0,
        "overtaken_by": 5,
        "cached_tokens": 2,
        "preemptions": 2,
        "recomputed_tokens": 20,
        "swapped_tokens": 200,
    }
