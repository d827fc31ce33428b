"""A stand-in for `triton_python_backend_utils`: what Triton server 2.51 gives a Python model.

`conftest.pb_utils` loads this file anew for each test. `server` holds what a test decides and reads: how
other models answer, which metrics there are, what fails.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
WAIT_SECONDS = 20.0
"""For what another thread does; a test that waits so long fails."""


class TritonModelException(Exception):
    """What the Python backend raises for everything."""


class TritonError:
    """An error in a response, with its code."""

    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self._message = message
        self._code = code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code

    def __str__(self) -> str:
        return self._message


class Tensor:
    """A named array."""

    def __init__(self, name: str, array: Any) -> None:
        self._name = name
        self._array = array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._array


class InferenceResponse:
    """Tensors or an error."""

    def __init__(self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None) -> None:
        self._tensors = list(output_tensors)
        self._error = error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


class ResponseSender:
    """Records what is sent. `fail` is called before each response; it may raise, as a full /dev/shm does.

    As in 2.51, one whose final response has failed takes no more, and its client waits for ever.
    """

    def __init__(self) -> None:
        self.responses: list[InferenceResponse] = []
        """Without those that carry only the final flag."""
        self.is_final = False
        self._is_closed = False
        self.fail: Callable[[InferenceResponse | None, int], None] = lambda response, flags: None
        self._changed = threading.Condition()

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        if self._is_closed:
            raise TritonModelException("the response sender has been closed")
        if response is None and not flags:
            raise TritonModelException("neither a response nor a flag")
        self._is_closed = bool(flags & TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        self.fail(response, flags)
        with self._changed:
            if response is not None:
                self.responses.append(response)
            self.is_final = self._is_closed
            self._changed.notify_all()

    def fail_next(self, times: int = 1) -> None:
        """Makes the next `times` sends raise, as a full /dev/shm does."""
        left = [times]

        def fail(response: InferenceResponse | None, flags: int) -> None:
            left[0] -= 1
            if left[0] >= 0:
                raise TritonModelException("no shared memory")

        self.fail = fail

    def wait(self, holds: Callable[[ResponseSender], bool] = lambda sender: sender.is_final) -> None:
        """Waits until the sender is so: by default, until the final response. Fails after WAIT_SECONDS."""
        with self._changed:
            assert self._changed.wait_for(lambda: holds(self), WAIT_SECONDS), "nothing came"

    @property
    def error(self) -> TritonError | None:
        """The first error sent."""
        return next((each.error() for each in self.responses if each.has_error()), None)

    def outputs(self, name: str) -> list[Any]:
        """The arrays of that name, response by response."""
        return [
            tensor.as_numpy()
            for response in self.responses
            for tensor in response.output_tensors()
            if tensor.name() == name
        ]


class InferenceRequest:
    """A request that a model sends (`exec`), or, with a `response_sender`, one that it gets.

    `server.answer` answers those that are sent.
    """

    def __init__(
        self,
        model_name: str = "",
        requested_output_names: Sequence[str] = (),
        inputs: Sequence[Tensor] = (),
        request_id: str = "",
        timeout: int = 0,
        parameters: dict[str, Any] | None = None,
    ) -> None:
        for name, value in (parameters or {}).items():
            if not isinstance(value, bool | int | str):
                raise TritonModelException(f"parameter {name}: only bool, int and str")
        self._model_name = model_name
        self._requested_output_names = list(requested_output_names)
        self._inputs = list(inputs)
        self._request_id = request_id
        self._timeout = timeout
        self._parameters = parameters or {}
        self.sender = ResponseSender()
        self.cancelled = False

    def model_name(self) -> str:
        return self._model_name

    def requested_output_names(self) -> list[str]:
        return self._requested_output_names

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def request_id(self) -> str:
        return self._request_id

    def timeout(self) -> int:
        return self._timeout

    def parameters(self) -> str:
        return json.dumps(self._parameters)

    def is_cancelled(self) -> bool:
        return self.cancelled

    def get_response_sender(self) -> ResponseSender:
        return self.sender

    def exec(self, decoupled: bool = False) -> Iterator[InferenceResponse] | InferenceResponse:
        responses = server.sent(self)
        return iter(responses) if decoupled else next(iter(responses))


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return next((tensor for tensor in request.inputs() if tensor.name() == name), None)


def get_output_tensor_by_name(response: InferenceResponse, name: str) -> Tensor | None:
    return next((tensor for tensor in response.output_tensors() if tensor.name() == name), None)


class _Metric:
    """One member of a family. `value` of a histogram: the sum of what was observed."""

    def __init__(self, name: str, labels: dict[str, str]) -> None:
        self._name = name
        self.labels = labels
        self.number = 0.0
        self.observed: list[float] = []
        self.num_calls = 0

    def increment(self, amount: float) -> None:
        with self._reported():
            self.number += amount

    def set(self, value: float) -> None:
        with self._reported():
            self.number = value

    def observe(self, value: float) -> None:
        with self._reported():
            self.observed.append(value)

    def value(self) -> float:
        return sum(self.observed) if self.observed else self.number

    @contextmanager
    def _reported(self) -> Iterator[None]:
        self.num_calls += 1
        if self._name in server.failing_metrics:
            raise TritonModelException(f"{self._name}: no shared memory")
        with server.changed:
            yield
            server.changed.notify_all()


class MetricKind(Enum):
    COUNTER = 0
    GAUGE = 1
    HISTOGRAM = 2


class MetricFamily:
    """Metrics of one name, by labels. Families made twice share their members, as in the server."""

    COUNTER, GAUGE, HISTOGRAM = MetricKind.COUNTER, MetricKind.GAUGE, MetricKind.HISTOGRAM

    def __init__(self, name: str, description: str, kind: MetricKind) -> None:
        self._name = name
        server.metrics.setdefault(name, [])

    def Metric(self, labels: dict[str, str], buckets: Sequence[float] = ()) -> _Metric:
        for metric in server.metrics[self._name]:
            if metric.labels == labels:
                return metric
        metric = _Metric(self._name, labels)
        server.metrics[self._name].append(metric)
        return metric


class FakeServer:
    """What a test decides, and what it can read."""

    def __init__(self) -> None:
        self.answer: Callable[[InferenceRequest], Iterable[InferenceResponse]] = lambda request: [
            InferenceResponse()
        ]
        """How another model answers a request sent to it. It may block, and it may raise."""
        self.requests: list[InferenceRequest] = []
        """Those that were sent to other models."""
        self.failing_metrics: set[str] = set()
        self.metrics: dict[str, list[_Metric]] = {}
        self.loads: list[tuple[str, str]] = []
        """("load" or "unload", model), in their order."""
        self.changed = threading.Condition()

    def sent(self, request: InferenceRequest) -> Iterable[InferenceResponse]:
        with self.changed:
            self.requests.append(request)
            self.changed.notify_all()
        return self.answer(request)

    def wait(self, holds: Callable[[FakeServer], bool]) -> None:
        """Waits until the server is so, looking at each request, (un)load and change of a metric."""
        with self.changed:
            assert self.changed.wait_for(lambda: holds(self), WAIT_SECONDS), "it did not come to that"

    def loaded(self, what: str, model: str) -> None:
        with self.changed:
            self.loads.append((what, model))
            self.changed.notify_all()

    def metric(self, name: str, **labels: str) -> float:
        """The value of a metric by its labels (without `model`); 0 where it was never touched."""
        return sum(
            each.value()
            for each in self.metrics.get(name, [])
            if {key: value for key, value in each.labels.items() if key != "model"} == labels
        )

    def metric_calls(self, name: str) -> int:
        """How many times any member of that family was changed."""
        return sum(each.num_calls for each in self.metrics.get(name, []))


server = FakeServer()


def load_model(model_name: str) -> None:
    server.loaded("load", model_name)


def unload_model(model_name: str) -> None:
    server.loaded("unload", model_name)
