"""`fastserve_infer`: every request goes on at once, and each gets exactly one response, whatever happens."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from fastserve.config import CONFIG_VARIABLE
from fastserve.errors import ErrorCode, RequestError

CODES = list(ErrorCode)


@pytest.fixture
def start(pb_utils: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Starts the model with these settings."""
    from fastserve.ensemble import infer

    monkeypatch.setattr(infer, "POLL_SECONDS", 0.01)
    pb_utils.is_model_ready = lambda model_name: True
    models = []

    def started(**settings: Any) -> Any:
        file = tmp_path / "config.json"
        file.write_text(json.dumps(settings))
        monkeypatch.setenv(CONFIG_VARIABLE, str(file))
        models.append(infer.InferModel())
        models[-1].initialize({})
        return models[-1]

    yield started
    for model in models:
        model.finalize()


def text_response(pb_utils: Any, text: str, *more: Any) -> Any:
    from fastserve.ensemble.messaging import strings

    return pb_utils.InferenceResponse([strings("text_output", [text]), *more])


def ask(pb_utils: Any, model: Any, *tensors: Any, **fields: Any) -> Any:
    """A request that the model has taken."""
    from fastserve.ensemble.messaging import strings

    request = pb_utils.InferenceRequest(inputs=[*(tensors or [strings("text_input", ["Hi"])])], **fields)
    model.execute([request])
    return request


def text_of(request: Any) -> str:
    """The one text that a request was answered with."""
    request.sender.wait()
    ((text,),) = request.sender.outputs("text_output")
    return text.decode()


class FastServe:
    """Answers requests as `fastserve` does: says at once that one is accepted, then waits for `go_on`."""

    def __init__(self, pb_utils: Any) -> None:
        self._pb_utils = pb_utils
        self.go_on = threading.Event()
        self.cancels: list[str] = []
        self.asked: list[Any] = []
        self.changed = threading.Condition()
        pb_utils.server.answer = self.answer

    def answer(self, request: Any) -> Iterable[Any]:
        if request.model_name() == "engine":
            from fastserve.ensemble.control_messages import CancelById
            from fastserve.ensemble.messaging import message_of

            with self.changed:
                cancel = message_of(request, "cancel", CancelById)
                assert cancel is not None
                self.cancels.append(cancel.request_id)
                self.changed.notify_all()
            return [self._pb_utils.InferenceResponse()]
        with self.changed:
            self.asked.append(request)
            self.changed.notify_all()
        return self._answers()

    def _answers(self) -> Iterator[Any]:
        yield text_response(self._pb_utils, "")
        assert self.go_on.wait(20)
        yield text_response(self._pb_utils, "the answer")
        yield self._pb_utils.InferenceResponse()

    def wait(self, holds: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(holds, 20)


def test_the_answer_follows_the_word_that_the_request_is_accepted(pb_utils: Any, start: Any) -> None:
    fastserve = FastServe(pb_utils)
    fastserve.go_on.set()
    request = ask(pb_utils, start(), timeout=5, request_id="mine")
    assert text_of(request) == "the answer"
    (inner,) = fastserve.asked
    assert (inner.model_name(), inner.timeout()) == ("fastserve", 5)
    assert inner.request_id() != "mine"


def test_all_go_on_at_once_and_beyond_the_bound_each_is_refused_at_once(pb_utils: Any, start: Any) -> None:
    fastserve = FastServe(pb_utils)
    model = start(max_num_seqs=3, max_queue_size=40)
    accepted = [ask(pb_utils, model) for _ in range(43)]
    fastserve.wait(lambda: len(fastserve.asked) == 43)
    refused = ask(pb_utils, model)
    assert refused.sender.is_final
    assert refused.sender.error.code() == pb_utils.TritonError.UNAVAILABLE
    assert refused.sender.error.message().startswith("UNAVAILABLE: the queue is full: 43 requests")
    assert pb_utils.server.metric("fastserve_requests_total", outcome="rejected") == 1
    fastserve.go_on.set()
    assert {text_of(request) for request in accepted} == {"the answer"}
    assert text_of(ask(pb_utils, model)) == "the answer"


def test_request_parameters_go_on_as_they_came(pb_utils: Any, start: Any) -> None:
    fastserve = FastServe(pb_utils)
    fastserve.go_on.set()
    sent = {"temperature": 0.7, "top_p": 1.0, "max_tokens": 5, "ignore_eos": True, "stop": "x"}
    text_of(ask(pb_utils, start(), parameters={}))
    request = pb_utils.InferenceRequest(inputs=[])
    request._parameters = {**sent, "id": "mine", "triton_x": 1}
    start().execute([request])
    text_of(request)
    assert json.loads(fastserve.asked[-1].parameters()) == {
        "temperature": "0.7",
        "top_p": 1,
        "max_tokens": 5,
        "ignore_eos": True,
        "stop": "x",
    }


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("form", ["error", "data", "exception"])
def test_an_error_keeps_its_code_however_it_comes(
    pb_utils: Any, start: Any, form: str, code: ErrorCode
) -> None:
    from fastserve.ensemble.forwarding import failure_tensors
    from fastserve.ensemble.messaging import error_response

    def answer(request: Any) -> Iterator[Any]:
        error = RequestError("`x`: got 1", code)
        if form == "exception":
            raise pb_utils.TritonModelException(f"in ensemble 'fastserve', {code.value}: `x`: got 1")
        if form == "error":
            yield error_response(error)
            return
        yield text_response(pb_utils, "")
        yield pb_utils.InferenceResponse(failure_tensors(error))

    pb_utils.server.answer = answer
    request = ask(pb_utils, start())
    request.sender.wait()
    assert request.sender.error.message() == f"{code.value}: `x`: got 1"
    assert request.sender.error.code() == getattr(pb_utils.TritonError, code.triton_code)


@pytest.mark.parametrize(("is_ready", "code"), [(False, "UNAVAILABLE"), (True, "INTERNAL")])
def test_what_triton_server_itself_says_is_unavailable_or_internal(
    pb_utils: Any, start: Any, is_ready: bool, code: str
) -> None:
    def answer(request: Any) -> Iterator[Any]:
        raise pb_utils.TritonModelException("Model 'fastserve' - no")

    pb_utils.server.answer = answer
    model = start()
    pb_utils.is_model_ready = lambda model_name: is_ready
    request = ask(pb_utils, model)
    request.sender.wait()
    assert request.sender.error.code() == getattr(pb_utils.TritonError, code)
    assert "fastserve" in request.sender.error.message()


def test_an_answer_that_does_not_come_is_an_error(pb_utils: Any, start: Any) -> None:
    pb_utils.server.answer = lambda request: []
    request = ask(pb_utils, start())
    request.sender.wait()
    assert "without an answer" in request.sender.error.message()


def test_an_answer_that_is_lost_fails_when_its_time_is_over(
    pb_utils: Any, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastserve.ensemble import infer

    monkeypatch.setattr(infer, "LOST_AFTER_SECONDS", 0.05)
    fastserve = FastServe(pb_utils)
    model = start(max_request_seconds=0.05, max_num_seqs=1, max_queue_size=1)
    request = ask(pb_utils, model)
    request.sender.wait()
    assert "has been lost" in request.sender.error.message()
    fastserve.go_on.set()  # and when it comes after all, there is no second response
    assert text_of(ask(pb_utils, model)) == "the answer"
    assert len(request.sender.responses) == 1


@pytest.mark.usefixtures("short_shared_memory")
def test_an_error_travels_with_the_final_flag(pb_utils: Any, start: Any) -> None:
    """A gRPC client of 2.51 takes an error without it for an answer without outputs."""
    sent: list[tuple[bool, int]] = []
    request = pb_utils.InferenceRequest(parameters={"stream": True})
    request.sender.fail = lambda response, flags: sent.append((response.has_error(), flags))
    start().execute([request])
    assert sent == [(True, pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)]


@pytest.mark.usefixtures("short_shared_memory")
def test_a_response_that_cannot_be_sent_becomes_an_error(pb_utils: Any, start: Any) -> None:
    def full(response: Any, flags: int) -> None:
        if response is not None and not response.has_error():
            raise pb_utils.TritonModelException("no shared memory is left")

    fastserve = FastServe(pb_utils)
    model = start(max_num_seqs=1, max_queue_size=1)
    request = ask(pb_utils, model)
    request.sender.fail = full
    fastserve.go_on.set()
    request.sender.wait()
    assert "no shared memory is left" in request.sender.error.message()


def test_a_response_that_cannot_be_sent_at_all_holds_no_place(pb_utils: Any, start: Any) -> None:
    def full(response: Any, flags: int) -> None:
        failed.set()
        raise pb_utils.TritonModelException("no shared memory is left")

    failed = threading.Event()
    fastserve = FastServe(pb_utils)
    model = start(max_num_seqs=1, max_queue_size=1)
    requests = [ask(pb_utils, model) for _ in range(2)]
    for request in requests:
        request.sender.fail = full
    fastserve.go_on.set()
    assert failed.wait(20)
    assert text_of(ask(pb_utils, model)) == "the answer"


def test_a_client_that_has_cancelled_stops_its_own_request_only(pb_utils: Any, start: Any) -> None:
    fastserve = FastServe(pb_utils)
    model = start()
    requests = [ask(pb_utils, model, request_id="same") for _ in range(3)]
    fastserve.wait(lambda: len(fastserve.asked) == 3)
    requests[1].cancelled = True
    fastserve.wait(lambda: bool(fastserve.cancels))
    fastserve.go_on.set()
    for request in requests:
        request.sender.wait()
    assert len(fastserve.cancels) == 1
    assert fastserve.cancels[0] in [inner.request_id() for inner in fastserve.asked]


def test_a_cancelled_client_is_not_forgotten_when_the_engine_cannot_be_told(
    pb_utils: Any, start: Any
) -> None:
    fastserve = FastServe(pb_utils)
    failures = [pb_utils.TritonModelException("no shared memory is left")]

    def answer(request: Any) -> Any:
        if request.model_name() == "engine" and failures:
            raise failures.pop()
        return fastserve.answer(request)

    pb_utils.server.answer = answer
    request = ask(pb_utils, start())
    request.cancelled = True
    fastserve.wait(lambda: bool(fastserve.cancels))
    assert fastserve.cancels == [fastserve.asked[0].request_id()]
    assert not failures
    fastserve.go_on.set()
    request.sender.wait()


def test_cancel_by_id_stops_what_came_through_this_model_and_any_other(pb_utils: Any, start: Any) -> None:
    from fastserve.ensemble.messaging import strings

    fastserve = FastServe(pb_utils)
    model = start()
    mine = ask(pb_utils, model, request_id="mine")
    fastserve.wait(lambda: len(fastserve.asked) == 1)
    cancel = ask(pb_utils, model, strings("cancel", ["mine"]))
    assert text_of(cancel) == ""
    assert fastserve.cancels == ["mine", fastserve.asked[0].request_id()]
    fastserve.go_on.set()
    mine.sender.wait()


def test_a_cancel_is_taken_when_the_queue_is_full_and_says_when_it_fails(pb_utils: Any, start: Any) -> None:
    from fastserve.ensemble.messaging import strings

    fastserve = FastServe(pb_utils)
    model = start(max_num_seqs=1, max_queue_size=1)
    requests = [ask(pb_utils, model) for _ in range(2)]
    assert text_of(ask(pb_utils, model, strings("cancel", ["x"]))) == ""

    def broken(request: Any) -> Any:
        raise pb_utils.TritonModelException("no shared memory is left")

    pb_utils.server.answer = broken
    cancel = ask(pb_utils, model, strings("cancel", ["x"]))
    cancel.sender.wait()
    assert cancel.sender.error.code() == pb_utils.TritonError.UNAVAILABLE
    fastserve.go_on.set()
    for request in requests:
        request.sender.wait()


@pytest.mark.parametrize(
    ("names", "field"), [(["cancel"], "cancel"), (["cancel", "text_input"], "cancel"), (["stream"], "stream")]
)
def test_what_it_cannot_do_is_refused_by_name(
    pb_utils: Any, start: Any, names: list[str], field: str
) -> None:
    import numpy as np

    from fastserve.ensemble.messaging import strings

    tensors = [
        pb_utils.Tensor(name, np.array([True])) if name == "stream" else strings(name, [""]) for name in names
    ]
    request = ask(pb_utils, start(), *tensors)
    assert request.sender.error.message().startswith(f"INVALID_ARG: `{field}`: got ")
