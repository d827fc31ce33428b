"""Keys at the models that clients call: who shows none gets nowhere, and nobody reaches another tenant's."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fastserve.access.key import new_key
from fastserve.access.keys_file import Keys, Tenant, edit_keys
from fastserve.config import CONFIG_VARIABLE, Config, TenantQuota
from fastserve.ensemble.control_messages import CancelById
from fastserve.errors import ErrorCode, RequestError
from fastserve.text.input_processor import InputProcessor
from fastserve.types import OutputOptions, Request, SamplingParams


class FakeTokenizer:
    """A token for each byte."""

    vocab_size = 256
    eos_token_ids: list[int] = []  # noqa: RUF012

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        return list(text.encode())


class Server:
    """A keys file with a key of the tenant `a` and one of `b`, and settings that name it."""

    def __init__(self, path: Path) -> None:
        self.keys_file, self.request_log = path / "keys.json", path / "requests.jsonl"
        (self.key, record), (self.other_key, other) = new_key("a", (-1, 5)), new_key("b")
        tenants = {"a": Tenant(quota=TenantQuota(requests_per_second=0.001), cache_salt="salt")}
        with edit_keys(self.keys_file) as box:
            box[0] = Keys(tenants=tenants, keys=(record, other))
        self.config = Config(keys_file=str(self.keys_file), request_log=str(self.request_log))

    def bearer(self, key: str | None = None) -> dict[str, Any]:
        return {"Authorization": f"Bearer {key or self.key}"}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server(tmp_path)
    file = tmp_path / "config.json"
    file.write_bytes(msgspec.json.encode(made.config))
    monkeypatch.setenv(CONFIG_VARIABLE, str(file))
    return made


@pytest.fixture
def preprocess(pb_utils: Any, server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from fastserve.ensemble import preprocess as module

    tokenizer: Any = FakeTokenizer()
    processor = InputProcessor(server.config, tokenizer, 64, 256)
    monkeypatch.setattr(module, "_load_input_processor", lambda config: processor)
    model = module.PreprocessModel()
    model.initialize({})
    yield model
    model.finalize()


def text_tensor(pb_utils: Any, name: str, value: str) -> Any:
    return pb_utils.Tensor(name, np.array([value.encode()], dtype=object))


def ask(pb_utils: Any, model: Any, parameters: dict[str, Any], *more: Any, **fields: Any) -> Any:
    """The one response of `preprocess`."""
    inputs = [text_tensor(pb_utils, "text_input", "Hi"), *more]
    [response] = model.execute([pb_utils.InferenceRequest(inputs=inputs, parameters=parameters, **fields)])
    return response


def request_of(response: Any) -> Request:
    from fastserve.ensemble.messaging import read_message

    assert not response.has_error(), response.error().message()
    return read_message("request", response.output_tensors()[0].as_numpy()[0], Request)


def test_a_request_becomes_its_keys_tenants(pb_utils: Any, server: Server, preprocess: Any) -> None:
    made = request_of(ask(pb_utils, preprocess, server.bearer() | {"priority": 3, "temperature": "0.5"}))
    assert (made.tenant, made.priority, made.cache_salt) == ("a", 3, "salt")
    assert made.sampling.temperature == 0.5
    assert made.key_id == server.key.split("_")[1]


@pytest.mark.parametrize(
    "parameters",
    [{}, {"Authorization": "Bearer fsk_0123456789ab_" + "x" * 43}, {"authorization": "Bearer "}],
)
def test_without_a_key_that_holds_nothing_is_read(
    pb_utils: Any, preprocess: Any, parameters: dict[str, Any]
) -> None:
    response = ask(pb_utils, preprocess, parameters | {"nonsense": 1})
    assert response.error().code() == pb_utils.TritonError.INVALID_ARG
    assert response.error().message().startswith("UNAUTHENTICATED: `authorization`: got ")


def test_a_body_cannot_hide_the_header(pb_utils: Any, server: Server, preprocess: Any) -> None:
    request = pb_utils.InferenceRequest(inputs=[text_tensor(pb_utils, "text_input", "Hi")])
    pairs = [server.bearer(), server.bearer(server.other_key)]
    request.parameters = lambda: "{" + ",".join(json.dumps(each)[1:-1] for each in pairs) + "}"
    [response] = preprocess.execute([request])
    assert "UNAUTHENTICATED: `authorization`: got more than one key" in response.error().message()


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"priority": 6}, "PERMISSION_DENIED: `priority`: got 6; allowed: -1 to 5, the range of the key"),
        ({"tenant": "b"}, "PERMISSION_DENIED: `tenant`: got 'b'; allowed: none, or 'a'"),
        ({"priority": 11}, "INVALID_ARG: `priority`: got 11"),
    ],
)
def test_what_the_key_does_not_allow_is_refused_by_name(
    pb_utils: Any, server: Server, preprocess: Any, parameters: dict[str, Any], sentence: str
) -> None:
    response = ask(pb_utils, preprocess, server.bearer() | parameters)
    assert sentence in response.error().message()


def test_refusals_are_in_the_request_log(pb_utils: Any, server: Server, preprocess: Any) -> None:
    ask(pb_utils, preprocess, {}, request_id="no key")
    ask(pb_utils, preprocess, server.bearer() | {"priority": 6}, request_id="too urgent")
    preprocess._request_log.close()
    records = [json.loads(line) for line in server.request_log.read_text().splitlines()]
    assert [(each["id"], each["outcome"], each["code"]) for each in records] == [
        ("no key", "rejected", "UNAUTHENTICATED"),
        ("too urgent", "rejected", "PERMISSION_DENIED"),
    ]
    preprocess._request_log = type(preprocess._request_log)(None)  # closed once


# --- fastserve_infer


@pytest.fixture
def infer(pb_utils: Any, server: Server) -> Iterator[Any]:
    from fastserve.ensemble import infer as module

    pb_utils.is_model_ready = lambda model_name: True
    model = module.InferModel()
    model.initialize({})
    yield model
    model.finalize()


def test_a_cancel_reaches_ones_own_requests_only(pb_utils: Any, server: Server, infer: Any) -> None:
    from fastserve.ensemble.messaging import message_of

    def cancel(**fields: Any) -> Any:
        tensor = text_tensor(pb_utils, "cancel", "theirs")
        request = pb_utils.InferenceRequest(inputs=[tensor], **fields)
        infer.execute([request])
        request.sender.wait()
        return request

    refused = cancel(parameters={})
    assert "UNAUTHENTICATED" in refused.sender.error.message()
    assert pb_utils.server.requests == []
    assert cancel(parameters=server.bearer()).sender.error is None
    [sent] = [message_of(each, "cancel", CancelById) for each in pb_utils.server.requests]
    assert sent is not None
    assert (sent.request_id, sent.tenant) == ("theirs", "a")
    now = time.monotonic()
    assert sent.applies_to(a_request(tenant="a", arrival=now - 9))
    assert not sent.applies_to(a_request(tenant="b", arrival=now - 9))


def test_what_never_reaches_fastserve_is_in_the_request_log(
    pb_utils: Any, server: Server, infer: Any
) -> None:
    infer.execute([pb_utils.InferenceRequest(request_id="no key")])
    infer._request_log.close()
    infer._request_log = type(infer._request_log)(None)  # closed once
    [record] = [json.loads(line) for line in server.request_log.read_text().splitlines()]
    assert (record["id"], record["outcome"], record["code"]) == ("no key", "rejected", "UNAUTHENTICATED")


def test_the_key_goes_on_to_fastserve(pb_utils: Any, server: Server, infer: Any) -> None:
    from fastserve.ensemble.messaging import strings

    pb_utils.server.answer = lambda request: [
        pb_utils.InferenceResponse([strings("text_output", ["the answer"])])
    ]
    request = pb_utils.InferenceRequest(
        inputs=[text_tensor(pb_utils, "text_input", "Hi")], parameters=server.bearer() | {"temperature": 1}
    )
    infer.execute([request])
    request.sender.wait()
    assert request.sender.error is None
    [inner] = pb_utils.server.requests
    assert json.loads(inner.parameters()) == server.bearer() | {"temperature": 1}


def a_request(**fields: Any) -> Request:
    return Request(
        uid="u",
        request_id="theirs",
        prompt="p",
        prompt_token_ids=[1],
        sampling=SamplingParams(),
        output=OutputOptions(),
        priority=0,
        deadline=None,
        **fields,
    )


def test_a_cancel_is_remembered_for_its_tenant(pb_utils: Any) -> None:
    from fastserve.ensemble.cancellation import RecentCancellations

    cancelled = RecentCancellations(60)
    cancelled.add(CancelById("theirs", 5.0, "a"))
    assert cancelled.applies_to(a_request(tenant="a", arrival=4.0))
    assert not cancelled.applies_to(a_request(tenant="b", arrival=4.0))
    assert not cancelled.applies_to(a_request(tenant="a", arrival=6.0))
    cancelled.add(CancelById("theirs", 6.0))
    assert cancelled.applies_to(a_request(tenant="b", arrival=6.0))


def test_quotas_of_the_keys_file_go_before_those_of_the_settings(
    pb_utils: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastserve.access import keyring
    from fastserve.ensemble.door import TenantQuotas

    def admits(tenant: str, uid: str) -> bool:
        tenant_quotas.refresh()
        try:
            tenant_quotas.quotas.admit(
                msgspec.structs.replace(a_request(tenant=tenant, arrival=0.0), uid=uid), 1.0
            )
        except RequestError:
            return False
        return True

    monkeypatch.setattr(keyring, "CHECK_SECONDS", 0.0)
    settings = {name: TenantQuota(requests_in_flight=1) for name in "ab"}
    tenant_quotas = TenantQuotas(msgspec.structs.replace(server.config, tenant_quotas=settings))
    assert [admits("a", "1"), admits("a", "2"), admits("b", "3"), admits("b", "4")] == [
        True,
        False,
        True,
        False,
    ]
    with edit_keys(server.keys_file) as box:
        box[0] = msgspec.structs.replace(
            box[0], tenants={"b": Tenant(quota=TenantQuota(requests_in_flight=2))}
        )
    assert [admits("b", "5"), admits("b", "6")] == [True, False]
    tenant_quotas.quotas.end("3", 0)
    assert admits("b", "7")
    assert [admits("a", "8")] == [False]  # in flight by the file's quota, and one is what the settings allow
    tenant_quotas.quotas.end("1", 0)
    assert [admits("a", "9"), admits("a", "10")] == [True, False]


def test_a_key_that_is_revoked_on_the_way_stops_in_the_queue(
    pb_utils: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastserve.access import keyring
    from fastserve.ensemble.door import TenantQuotas

    monkeypatch.setattr(keyring, "CHECK_SECONDS", 0.0)
    tenant_quotas = TenantQuotas(server.config)
    key_id = server.key.split("_")[1]
    request = a_request(tenant="a", arrival=0.0, key_id=key_id)
    tenant_quotas.check_key(request)
    with edit_keys(server.keys_file) as box:
        box[0] = box[0].revoke(key_id, "now")
    tenant_quotas.refresh()
    with pytest.raises(RequestError, match="revoked") as caught:
        tenant_quotas.check_key(request)
    assert caught.value.code is ErrorCode.UNAUTHENTICATED
    with pytest.raises(RequestError, match="revoked"):
        tenant_quotas.check_key(a_request(tenant="a", arrival=0.0))
    TenantQuotas(Config()).check_key(request)


def test_what_was_released_once_is_spent_until_its_deadline(pb_utils: Any) -> None:
    from fastserve.ensemble.spent_requests import SpentRequests

    spent, request = SpentRequests(60), a_request(tenant="a", arrival=0.0)
    assert [spent.spend(request, now) for now in (1.0, 2.0, 60.9)] == [True, False, False]
    assert spent.spend(msgspec.structs.replace(request, uid="other"), 61.0)
    assert len(spent) == 1
