"""A server with keys and TLS: nobody gets in elsewhere, quotas are per tenant, nothing that users write is in
a log, a metric or an error."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from tests.access.test_masking import synthetic_secrets
from tests.e2e.conftest import Launch, RunningServer
from tests.encoder_checkpoints import save_encoder
from tritonclient.grpc import service_pb2, service_pb2_grpc

from fastserve.access.key import id_of, new_key
from fastserve.access.keys_file import Keys, Tenant, edit_keys
from fastserve.config import TenantQuota
from fastserve.encoders.measure_steps import measure
from fastserve.encoders.served_encoder import EncoderSettings, ServedEncoder
from fastserve.launcher.tls import TlsFiles
from fastserve_client import Client, FastServeError

MODELS = (
    "fastserve",
    "fastserve_infer",
    "preprocess",
    "scheduler",
    "engine",
    "postprocess",
    "readiness",
    "embed",
)
OPEN_GRPC = {"ServerLive", "ServerReady", "ModelReady"}
OPEN_HTTP = [
    ("GET", "/v2/health/live"),
    ("GET", "/v2/health/ready"),
    *(("GET", f"/v2/models/{model}/ready") for model in MODELS),
    *(("GET", f"/v2/models/{model}/versions/1/ready") for model in MODELS),
]
CLOSED_HTTP = [
    ("GET", "/v2"),
    ("GET", "/v2/models/stats"),
    ("GET", "/v2/trace/setting"),
    ("POST", "/v2/trace/setting"),
    ("GET", "/v2/logging"),
    ("POST", "/v2/logging"),
    ("POST", "/v2/repository/index"),
    *(
        ("POST", f"/v2/repository/models/{model}/{what}")
        for model in ("engine", "new")
        for what in ("load", "unload")
    ),
    *(
        (method, f"/v2/{kind}sharedmemory/{rest}")
        for kind in ("system", "cuda")
        for method, rest in (
            ("GET", "status"),
            ("GET", "region/a/status"),
            ("POST", "region/a/register"),
            ("POST", "region/a/unregister"),
            ("POST", "unregister"),
        )
    ),
    *(
        (method, f"/v2/models/{model}{version}{what}")
        for model in MODELS
        for version in ("", "/versions/1")
        for method, what in (("GET", ""), ("GET", "/config"), ("GET", "/stats"))
    ),
    *((method, f"/v2/models/{model}/trace/setting") for model in MODELS for method in ("GET", "POST")),
]
NOT_THERE_HTTP = [("GET", path) for path in ("/", "/metrics", "/v1/models", "/v3", "/ping", "/invocations")]
INFERENCE_HTTP = [
    ("POST", f"/v2/models/{model}{version}/{what}")
    for model in MODELS
    for version in ("", "/versions/1")
    for what in ("infer", "generate", "generate_stream")
]


@dataclass(frozen=True)
class Access:
    """A server, and what its clients have."""

    server: RunningServer
    folder: Path
    keys: dict[str, str]
    """By tenant."""

    @property
    def keys_file(self) -> Path:
        return self.folder / "keys.json"

    @property
    def request_log(self) -> Path:
        return self.folder / "requests.jsonl"

    def tls(self) -> dict[str, Any]:
        """What TLS wants of a client, as `Client` names it."""
        names = ("root_certificates", "private_key", "certificate_chain")
        return {"ssl": True, **{name: self.folder / name for name in names}}

    def client(self, tenant: str | None, protocol: Any = "grpc", **options: Any) -> Client:
        """A client with the key of a tenant, or none."""
        key = None if tenant is None else self.keys[tenant]
        url = self.server.grpc_url if protocol == "grpc" else self.server.http_url
        return Client(url, protocol, key=key, **{"retries": 0, **self.tls(), **options})

    def http(
        self, method: str, path: str, body: bytes = b"{}", headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Status and body."""
        context = ssl.create_default_context(cafile=self.folder / "root_certificates")
        context.load_cert_chain(self.folder / "certificate_chain", self.folder / "private_key")
        connection = http.client.HTTPSConnection(self.server.http_url, timeout=30, context=context)
        try:
            connection.request(method, path, body if method == "POST" else None, headers or {})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def grpc_channel(self) -> grpc.Channel:
        names = ("root_certificates", "private_key", "certificate_chain")
        credentials = grpc.ssl_channel_credentials(*((self.folder / name).read_bytes() for name in names))
        return grpc.secure_channel(self.server.grpc_url, credentials)

    def log(self) -> list[dict[str, Any]]:
        """The lines of the request log."""
        return [json.loads(line) for line in self.request_log.read_text().splitlines()]

    def wait_for_log(self, holds: Any) -> dict[str, Any]:
        """The first line of the request log that is so; a model writes it when it has answered."""
        give_up = time.monotonic() + 20
        while time.monotonic() < give_up:
            for line in self.log() if self.request_log.exists() else ():
                if holds(line):
                    return line
            time.sleep(0.02)
        raise AssertionError("no such line in the request log")


def write_certificates(folder: Path) -> TlsFiles:
    """Those of a server and of its clients."""
    authority = trustme.CA()
    server, client = authority.issue_cert("127.0.0.1"), authority.issue_cert("client@example.com")
    authority.cert_pem.write_to_path(str(folder / "root_certificates"))
    for name, issued in (("server_", server), ("", client)):
        issued.private_key_pem.write_to_path(str(folder / f"{name}private_key"))
        chain = b"".join(part.bytes() for part in issued.cert_chain_pems)
        (folder / f"{name}certificate_chain").write_bytes(chain)
    return TlsFiles(
        folder / "server_certificate_chain", folder / "server_private_key", folder / "root_certificates"
    )


@pytest.fixture(scope="module")
def access(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Access]:
    folder = tmp_path_factory.mktemp("access")
    made = {tenant: new_key(tenant) for tenant in ("paying", "free", "leaving")}
    made["free"] = new_key("free", priority_range=(-10, 0), models=("fastserve",))
    with edit_keys(folder / "keys.json") as box:
        box[0] = Keys(
            tenants={
                "free": Tenant(quota=TenantQuota(requests_in_flight=1)),
                "paying": Tenant(cache_salt="its own"),
            },
            keys=tuple(key for _, key in made.values()),
        )
    keys = {tenant: shown for tenant, (shown, _) in made.items()}
    tls = write_certificates(folder)
    settings = {"keys_file": str(folder / "keys.json"), "request_log": str(folder / "requests.jsonl")}
    save_encoder(folder / "encoder", "bert")
    encoder = EncoderSettings(model=str(folder / "encoder"), num_threads=1)
    served = ServedEncoder(name="embed", settings=encoder, profile=measure(encoder, min_seconds=0.0))
    with launch(tls=tls, encoders=(served,), **settings) as server:
        yield Access(server, folder, keys)


# --- nobody gets in elsewhere


def test_without_a_key_http_tells_its_health_and_nothing_else(access: Access) -> None:
    for method, path in OPEN_HTTP:
        assert access.http(method, path) == (200, b""), path
    for method, path in CLOSED_HTTP:
        status, body = access.http(method, path)
        assert status in (403, 404, 405), (method, path, status, body)
        if status == 403:
            assert b"restricted" in body, (path, body)
    for method, path in NOT_THERE_HTTP:
        assert access.http(method, path)[0] in (400, 404, 405), path
    for method, path in INFERENCE_HTTP:
        status, body = access.http(method, path, b'{"text_input": "Hi", "cancel": "x"}')
        assert status in (400, 404, 500, 501), (path, status, body)
        assert b"error" in body
        assert b"text_output" not in body
        if "/fastserve" in path and "generate" in path:
            assert b"UNAUTHENTICATED: `authorization`: got no key" in body, path


def test_without_a_key_grpc_tells_its_health_and_nothing_else(access: Access) -> None:
    service = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    with access.grpc_channel() as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for method in service.methods:
            request = getattr(service_pb2, method.input_type.name)()
            call = getattr(stub, method.name)
            if method.name in OPEN_GRPC:
                call(request, timeout=30)
            elif method.name not in ("ModelInfer", "ModelStreamInfer"):
                with pytest.raises(grpc.RpcError) as caught:
                    call(request, timeout=30)
                assert "restricted" in str(caught.value), method.name
        for model in MODELS:
            request = service_pb2.ModelInferRequest(model_name=model)
            tensor = request.inputs.add(name="text_input", shape=[1], datatype="BYTES")
            tensor.contents.bytes_contents.append(b"Hi")
            [response] = stub.ModelStreamInfer(iter([request]), timeout=30)
            assert response.error_message
            with pytest.raises(grpc.RpcError):
                stub.ModelInfer(request, timeout=30)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_without_a_key_or_with_a_wrong_one_nothing_is_served(access: Access, protocol: str) -> None:
    with access.client(None, protocol) as client:
        assert client.is_ready()
        with pytest.raises(FastServeError, match="`authorization`: got no key") as caught:
            client.generate("Hi", max_tokens=1)
        assert caught.value.code == "UNAUTHENTICATED"
    wrong = replace(access, keys={"paying": access.keys["paying"][:-1] + "-"})
    with wrong.client("paying", protocol) as client:
        with pytest.raises(FastServeError, match="not known, or was revoked") as caught:
            client.generate("Hi", max_tokens=1)
        assert caught.value.code == "UNAUTHENTICATED"


def test_the_headers_that_would_open_the_rest_cannot_be_sent(access: Access) -> None:
    command = Path(f"/proc/{access.server.launcher.process.pid}/cmdline").read_bytes().decode().split("\0")
    [word] = [word for word in command if word.startswith("--http-restricted-api=")]
    name, _, value = word.partition(":")[2].partition("=")
    context = ssl.create_default_context(cafile=access.folder / "root_certificates")
    context.load_cert_chain(access.folder / "certificate_chain", access.folder / "private_key")
    host, _, port = access.server.http_url.partition(":")
    for header in (
        f"{name}: {value}",
        f"{name}:{value}",
        f"{name}: {value.strip()}",
        f"{name}: " + value.replace("\r\n", "\r\n "),
        f"{name}: " + value.replace("\r\n", "\n"),
        f"{name}: " + value.replace("\r\n", "\r"),
        f"{name.replace(' ', '')}: {value}",
    ):
        plain = socket.create_connection((host, int(port)), timeout=30)
        with context.wrap_socket(plain, server_hostname=host) as connection:
            head = (
                "POST /v2/repository/index HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 2\r\n"
            )
            connection.sendall(f"{head}{header}\r\n\r\n{{}}".encode())
            answer = connection.recv(1 << 16)
        assert b" 200 " not in answer.split(b"\r\n")[0] + b" ", header
        assert b'"name"' not in answer


def infer_body(parameters: dict[str, Any]) -> bytes:
    """Of HTTP `infer`."""
    tensor = {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["Hi"]}
    return json.dumps({"inputs": [tensor], "parameters": {"max_tokens": 1} | parameters}).encode()


@pytest.mark.parametrize("name", ["Authorization", "authorization"])
def test_a_body_cannot_stand_for_a_header_that_is_there(access: Access, name: str) -> None:
    header = {"Authorization": f"Bearer {access.keys['paying']}"}
    path = "/v2/models/fastserve_infer/infer"
    status, answer = access.http("POST", path, infer_body({}), header)
    assert (status, b"text_output" in answer) == (200, True), answer
    for key in (access.keys["free"], access.keys["paying"]):
        status, answer = access.http("POST", path, infer_body({name: f"Bearer {key}"}), header)
        assert (status, b"got more than one key" in answer) == (400, True), answer
    with access.grpc_channel() as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = service_pb2.ModelInferRequest(model_name="fastserve")
        tensor = request.inputs.add(name="text_input", shape=[1], datatype="BYTES")
        tensor.contents.bytes_contents.append(b"Hi")
        request.parameters[name].string_param = f"Bearer {access.keys['free']}"
        metadata = [("authorization", f"Bearer {access.keys['paying']}")]
        [response] = stub.ModelStreamInfer(iter([request]), timeout=30, metadata=metadata)
        assert "UNAUTHENTICATED: `authorization`: got more than one key" in response.error_message


# --- what a key allows


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_key_lets_its_tenant_in(access: Access, protocol: str) -> None:
    with access.client("paying", protocol) as client:
        assert client.generate("The capital of France is", max_tokens=5, temperature=0).text
        assert len(list(client.stream("Hi", max_tokens=3, priority=4, request_id=f"mine {protocol}"))) > 0
    line = access.wait_for_log(lambda line: line["id"] == f"mine {protocol}")
    assert (line["tenant"], line["priority"], line["output_tokens"]) == ("paying", 4, 3)
    assert line["key"] == id_of(access.keys["paying"])
    assert line["outcome"] == "length"
    assert 0 < line["first_token_seconds"] <= line["total_seconds"]


def test_the_plain_infer_wants_a_key_too(access: Access) -> None:
    for tenant in ("paying", None):
        body: dict[str, Any] = {"text_input": "Hi", "parameters": {"max_tokens": 1}}
        if tenant is not None:
            body["parameters"]["authorization"] = f"Bearer {access.keys[tenant]}"
        path = "/v2/models/fastserve_infer/generate"
        status, answer = access.http("POST", path, json.dumps(body).encode())
        assert status == (400 if tenant is None else 200), answer
        assert (b"UNAUTHENTICATED" in answer) is (tenant is None)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_an_encoder_wants_a_key_for_it(access: Access, protocol: str) -> None:
    with access.client("paying", protocol) as client:
        assert client.embed(["w1 w2"]).shape[0] == 1
    line = access.wait_for_log(lambda line: line["model"] == "embed" and line["outcome"] == "success")
    assert (line["tenant"], line["key"]) == ("paying", id_of(access.keys["paying"]))
    assert line["prompt_tokens"] >= 2
    for tenant, code in ((None, "UNAUTHENTICATED"), ("free", "PERMISSION_DENIED")):
        with access.client(tenant, protocol) as client:
            with pytest.raises(FastServeError) as caught:
                client.embed(["w1 w2"])
            assert caught.value.code == code


def test_what_a_key_does_not_allow_is_refused_by_name(access: Access) -> None:
    with access.client("free") as client:
        with pytest.raises(FastServeError, match=r"`priority`: got 1; allowed: -10 to 0") as caught:
            client.generate("Hi", max_tokens=1, priority=1)
        assert caught.value.code == "PERMISSION_DENIED"
        with pytest.raises(
            FastServeError, match="`tenant`: got 'paying'; allowed: none, or 'free'"
        ) as caught:
            client.generate("Hi", max_tokens=1, tenant="paying")
        assert caught.value.code == "PERMISSION_DENIED"


def test_a_tenant_is_limited_and_others_are_not_and_nobody_cancels_anothers(access: Access) -> None:
    with access.client("free") as free, access.client("paying") as paying:
        stream = free.stream("Once upon a time", max_tokens=2000, ignore_eos=True, request_id="shared name")
        next(stream)
        with pytest.raises(FastServeError, match=r"its quota of 1 requests in flight") as caught:
            free.generate("Hi", max_tokens=1)
        assert caught.value.code == "UNAVAILABLE"
        assert caught.value.retry_after is not None
        paying.cancel("shared name")
        paying.generate("Hi", max_tokens=5)
        next(stream)
        free.cancel("shared name")
        with pytest.raises(FastServeError) as caught:
            list(stream)
        assert caught.value.code == "CANCELLED"
    refused = access.wait_for_log(
        lambda line: line.get("tenant") == "free" and line.get("code") == "UNAVAILABLE"
    )
    assert refused["outcome"] == "rejected"
    ended = access.wait_for_log(lambda line: line["id"] == "shared name")
    assert (ended["tenant"], ended["outcome"]) == ("free", "cancelled")


def test_a_revoked_key_stops_within_five_seconds(access: Access) -> None:
    with access.client("leaving") as client:
        client.generate("Hi", max_tokens=1)
        with edit_keys(access.keys_file) as box:
            box[0] = box[0].revoke(id_of(access.keys["leaving"]) or "", "now")
        start = time.monotonic()
        while True:
            try:
                client.generate("Hi", max_tokens=1)
            except FastServeError as error:
                assert error.code == "UNAUTHENTICATED"  # noqa: PT017
                break
            assert time.monotonic() - start < 5


def test_tenants_of_another_salt_share_no_prefix(access: Access) -> None:
    prompt = "A long prompt that fills some blocks of the cache, word by word by word. " * 8
    for tenant, name in (("paying", "1"), ("free", "2"), ("paying", "3")):
        with access.client(tenant) as client:
            client.generate(prompt, max_tokens=1, request_id=f"salt {name}")
    cached = [
        access.wait_for_log(lambda line, name=name: line["id"] == f"salt {name}").get("cached_tokens", 0)
        for name in "123"
    ]
    assert cached[:2] == [0, 0]
    assert cached[2] > 50


# --- nothing that users write is written down


def test_no_secret_is_in_a_log_a_metric_or_an_error(access: Access) -> None:
    secrets = [secret for values in synthetic_secrets().values() for secret in values]
    assert len(secrets) == 200
    errors = []
    with access.client("paying") as client:
        for number, secret in enumerate(secrets):
            prompt = f"My secret is {secret}."
            if number % 4 == 0:  # the answer has it too
                response = client.generate(prompt, max_tokens=1, exclude_input_in_output=False)
                assert secret in response.text
            elif number % 4 == 1:
                wrong: Any = [{"role": "user", "content": {"text": prompt}}]
                with pytest.raises(FastServeError) as caught:
                    client.generate(messages=wrong, max_tokens=1)
                errors.append(caught.value)
            elif number % 4 == 2:
                with pytest.raises(FastServeError) as caught:
                    client.generate(prompt, max_tokens=1, stop=[1, prompt])  # type: ignore[list-item]
                errors.append(caught.value)
            else:
                client.generate(messages=[{"role": "user", "content": prompt}], max_tokens=1)
    access.wait_for_log(lambda line: line["outcome"] == "rejected" and line.get("code") == "INVALID_ARG")
    places = {
        "errors": "\n".join(map(str, errors)),
        "server's log": access.server.launcher.log_path.read_text(errors="replace"),
        "request log": access.request_log.read_text(),
        "metrics": "\n".join(access.server.metrics()),
    }
    assert all(places.values())
    for secret in [*secrets, *access.keys.values()]:
        for place, text in places.items():
            assert secret.removeprefix("password: ") not in text, place
