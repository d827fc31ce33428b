"""A server in the test's process that speaks both protocols and does as the test says."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import trustme
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


class Endless:
    """A token every 20 ms until the client is gone."""


Step = dict[str, list[Any]] | Refusal | Hang | Endless


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

    def steps(self, received: Received) -> list[Step]:
        """What the script has for a request."""
        self.received.append(received)
        return self.script.pop(0) if len(self.script) > 1 else self.script[0]

    hang = Hang
    endless = Endless
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


def responses(server: FakeServer, received: Received) -> Iterator[dict[str, list[Any]] | Hang]:
    """What the script has for a request. Raises Refusal where there is one."""
    for step in server.steps(received):
        if isinstance(step, Refusal):
            raise step
        if not isinstance(step, Endless):
            yield step
            continue
        while not server.client_gone.wait(0.02):
            yield server.token("x")


class _GrpcService(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, server: FakeServer) -> None:
        self._server = server

    def ServerReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=self._server.ready)

    def ModelStreamInfer(self, messages: Iterator[Any], context: Any) -> Iterator[Any]:
        received = _received_by_grpc(next(messages), dict(context.invocation_metadata()))
        # Before the first response: a call that has ended is asked for no other.
        if any(isinstance(step, (Hang, Endless)) for step in self._server.script[0]):
            context.add_callback(self._server.client_gone.set)
        try:
            for response in responses(self._server, received):
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
                for response in responses(server, received):
                    if isinstance(response, Hang):
                        self.rfile.read(1)  # returns when the client is gone
                        server.client_gone.set()
                        return
                    self._send({name: v[0] if len(v) == 1 else v for name, v in response.items()}, 200)
            except Refusal as refusal:
                self._send({"error": refusal.on_the_wire()}, 400)
            except OSError:
                server.client_gone.set()
                raise
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
            event = b"data: " + json.dumps(members, ensure_ascii=False).encode() + b"\n\n"
            self.wfile.write(b"%x\r\n%b\r\n" % (len(event), event))
            self.wfile.flush()

        def log_message(self, *arguments: Any) -> None:
            """Says nothing."""

    return Handler


@dataclass(frozen=True)
class Certificates:
    """PEM files, by the names that a client has for them: an authority, and what it signed."""

    root_certificates: Path
    private_key: Path
    certificate_chain: Path
    server_key: Path
    server_chain: Path

    def of_client(self) -> dict[str, Any]:
        """A client's arguments."""
        return {
            name: getattr(self, name) for name in ("root_certificates", "private_key", "certificate_chain")
        }


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    directory = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    server, client = authority.issue_cert("127.0.0.1"), authority.issue_cert("client@example.com")
    blobs = {
        "root_certificates": [authority.cert_pem],
        "private_key": [client.private_key_pem],
        "certificate_chain": client.cert_chain_pems,
        "server_key": [server.private_key_pem],
        "server_chain": server.cert_chain_pems,
    }
    for name, parts in blobs.items():
        (directory / name).write_bytes(b"".join(part.bytes() for part in parts))
    return Certificates(**{name: directory / name for name in blobs})


def _grpc_port(grpc_server: grpc.Server, certificates: Certificates | None) -> int:
    if certificates is None:
        return grpc_server.add_insecure_port("127.0.0.1:0")
    pair = (certificates.server_key.read_bytes(), certificates.server_chain.read_bytes())
    root = certificates.root_certificates.read_bytes()
    return grpc_server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair], root, True))


def _with_tls(plain: socket.socket, certificates: Certificates) -> socket.socket:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=certificates.root_certificates)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(certificates.server_chain, certificates.server_key)
    # Hands are shaken by the thread of the connection, not by the one that accepts.
    return context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)


@contextmanager
def running_server(certificates: Certificates | None = None) -> Iterator[FakeServer]:
    """On loopback; with certificates it speaks TLS only, and asks clients for a certificate."""
    fake = FakeServer()
    with ThreadPoolExecutor(8) as threads:
        grpc_server = grpc.server(threads)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_GrpcService(fake), grpc_server)
        fake.urls["grpc"] = f"127.0.0.1:{_grpc_port(grpc_server, certificates)}"
        grpc_server.start()
        http_server = ThreadingHTTPServer(("127.0.0.1", 0), _http_handler(fake))
        http_server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client may break off
        if certificates:
            http_server.socket = _with_tls(http_server.socket, certificates)
        fake.urls["http"] = f"127.0.0.1:{http_server.server_port}"
        serving = threading.Thread(target=http_server.serve_forever, args=(0.01,))
        serving.start()
        yield fake
        http_server.shutdown()
        http_server.server_close()
        serving.join()
        grpc_server.stop(None).wait()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with running_server() as fake:
        yield fake


@pytest.fixture
def tls_server(certificates: Certificates) -> Iterator[FakeServer]:
    with running_server(certificates) as fake:
        yield fake
