"""A server in the test's process that speaks both protocols and does as the test says."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import serialize_byte_tensor

DATATYPES = {
    "token_ids": ("INT64", np.int64),
    "num_input_tokens": ("UINT32", np.uint32),
    "num_output_tokens": ("UINT32", np.uint32),
    "cumulative_logprob": ("FP32", np.float32),
}


class Refusal(Exception):
    """An error of the model."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    def on_the_wire(self) -> str:
        """As FastServe and the ensemble write it."""
        return f"in ensemble 'fastserve', {self.code}: {self}"


class Hang:
    """Nothing more comes until the client is gone."""


Step = dict[str, list[Any]] | Refusal | Hang


@dataclass
class Received:
    """A request as the server saw it."""

    model: str
    inputs: dict[str, Any]
    request_id: str
    timeout_us: int | None
    headers: dict[str, str]


@dataclass
class FakeServer:
    """`script` holds the answers to the next requests; the last one stays."""

    script: list[list[Step]] = field(default_factory=list)
    urls: dict[str, str] = field(default_factory=dict)
    received: list[Received] = field(default_factory=list)
    client_gone: threading.Event = field(default_factory=threading.Event)
    ready: bool = True
    linger_seconds: float = 0.0
    """Between the error of a stream over gRPC and its end."""
    was_left_first: bool = False
    """The client has cancelled a stream in that time, which is over with `has_lingered`."""
    has_lingered: threading.Event = field(default_factory=threading.Event)

    def answer(self, received: Received) -> Iterator[dict[str, list[Any]] | Hang]:
        """The responses to a request. Raises Refusal where the script has one."""
        self.received.append(received)
        steps = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        for step in steps:
            if isinstance(step, Refusal):
                raise step
            yield step

    hang = Hang
    refusal = Refusal

    @staticmethod
    def token(text: str, finish_reason: str = "None", **others: list[Any]) -> dict[str, list[Any]]:
        """A response that brings one token to a request with n = 1."""
        return {
            "text_output": [text],
            "finish_reason": [finish_reason],
            "num_input_tokens": [5],
            "num_output_tokens": [1],
            **others,
        }


class _GrpcService(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, server: FakeServer) -> None:
        self._server = server

    def ServerReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=self._server.ready)

    def ModelStreamInfer(self, messages: Iterator[Any], context: Any) -> Iterator[Any]:
        context.add_callback(self._server.client_gone.set)
        received = _received_by_grpc(next(messages), dict(context.invocation_metadata()))
        try:
            for response in self._server.answer(received):
                if isinstance(response, Hang):
                    self._server.client_gone.wait(10)
                    return
                yield _grpc_response(response)
        except Refusal as refusal:
            yield service_pb2.ModelStreamInferResponse(error_message=refusal.on_the_wire())
            self._server.was_left_first |= self._server.client_gone.wait(self._server.linger_seconds)
            self._server.has_lingered.set()


def _received_by_grpc(message: Any, headers: dict[str, str]) -> Received:
    inputs = {}
    for tensor in message.inputs:
        (_, elements), *_ = tensor.contents.ListFields()
        values = [value.decode() if isinstance(value, bytes) else value for value in elements]
        assert list(tensor.shape) == [len(values)]
        inputs[tensor.name] = values if tensor.name == "prompt_token_ids" else values[0]
    timeout = message.parameters["timeout"].int64_param if "timeout" in message.parameters else None
    return Received(message.model_name, inputs, message.id, timeout, headers)


def _grpc_response(response: dict[str, list[Any]]) -> Any:
    message = service_pb2.ModelInferResponse(model_name="fastserve")
    for name, values in response.items():
        datatype, dtype = DATATYPES.get(name, ("BYTES", np.object_))
        array = np.array(values, dtype=dtype)
        message.outputs.add(name=name, datatype=datatype, shape=array.shape)
        raw = serialize_byte_tensor(array).item() if datatype == "BYTES" else array.tobytes()
        message.raw_output_contents.append(raw)
    return service_pb2.ModelStreamInferResponse(infer_response=message)


def _http_handler(server: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200 if server.ready else 400)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_POST(self) -> None:
            inputs = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            received = Received(
                model=self.path.split("/")[3],
                request_id=inputs.pop("id", ""),
                timeout_us=inputs.pop("timeout", None),
                inputs=inputs,
                headers={name.lower(): value for name, value in self.headers.items()},
            )
            self._started = False
            try:
                for response in server.answer(received):
                    if isinstance(response, Hang):
                        self.rfile.read(1)  # returns when the client is gone
                        server.client_gone.set()
                        return
                    self._send({name: v[0] if len(v) == 1 else v for name, v in response.items()}, 200)
            except Refusal as refusal:
                self._send({"error": refusal.on_the_wire()}, 400)
            self._start(200)
            self.wfile.write(b"0\r\n\r\n")

        def _start(self, status: int) -> None:
            if not self._started:
                self.send_response(status)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self._started = True

        def _send(self, members: dict[str, Any], status: int) -> None:
            self._start(status)
            event = b"data: " + json.dumps(members).encode() + b"\n\n"
            self.wfile.write(b"%x\r\n%b\r\n" % (len(event), event))
            self.wfile.flush()

        def log_message(self, *arguments: Any) -> None:
            """Says nothing."""

    return Handler


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    with ThreadPoolExecutor(8) as threads:
        grpc_server = grpc.server(threads)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_GrpcService(fake), grpc_server)
        fake.urls["grpc"] = f"127.0.0.1:{grpc_server.add_insecure_port('127.0.0.1:0')}"
        grpc_server.start()
        http_server = ThreadingHTTPServer(("127.0.0.1", 0), _http_handler(fake))
        fake.urls["http"] = f"127.0.0.1:{http_server.server_port}"
        serving = threading.Thread(target=http_server.serve_forever, args=(0.01,))
        serving.start()
        yield fake
        http_server.shutdown()
        http_server.server_close()
        serving.join()
        grpc_server.stop(None).wait()
