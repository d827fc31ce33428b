"""Connections with TLS, against a server on loopback that asks its clients for a certificate."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from fastserve_client import AsyncClient, Client, FastServeError

if TYPE_CHECKING:
    from tests.client.conftest import Certificates, FakeServer

    Protocol = Literal["grpc", "http"]


@pytest.fixture(params=["grpc", "http"])
def protocol(request: pytest.FixtureRequest) -> Protocol:
    return request.param


def test_a_stream_comes_through(
    tls_server: FakeServer, certificates: Certificates, protocol: Protocol
) -> None:
    tls_server.script = [[tls_server.token("x"), tls_server.token("y", "stop")]]
    url, headers = tls_server.urls[protocol], {"Authorization": "Bearer key"}
    with Client(url, protocol, headers=headers, ssl=True, **certificates.of_client()) as client:
        assert client.is_ready()
        assert [chunk.text for chunk in client.stream("p")] == ["x", "y"]
    assert [received.headers["authorization"] for received in tls_server.received] == ["Bearer key"]


def test_an_async_stream_comes_through(
    tls_server: FakeServer, certificates: Certificates, protocol: Protocol
) -> None:
    async def ask() -> list[str]:
        url = tls_server.urls[protocol]
        async with AsyncClient(url, protocol, ssl=True, **certificates.of_client()) as client:
            assert await client.is_ready()
            return [chunk.text async for chunk in client.stream("p")]

    tls_server.script = [[tls_server.token("x"), tls_server.token("y", "stop")]]
    assert asyncio.run(ask()) == ["x", "y"]


@pytest.mark.parametrize(
    "names", [[], ["root_certificates"], ["private_key", "certificate_chain"]], ids=["none", "root", "own"]
)
def test_who_lacks_a_certificate_is_refused(
    tls_server: FakeServer, certificates: Certificates, protocol: Protocol, names: list[str]
) -> None:
    files: dict[str, Any] = {name: certificates.of_client()[name] for name in names}
    url = tls_server.urls[protocol]
    with Client(url, protocol, retries=0, ssl=True, **files) as client:
        assert not client.is_ready(timeout=10)
        with pytest.raises(FastServeError) as caught:
            client.generate("p")
    assert caught.value.code == "UNAVAILABLE"
    assert tls_server.received == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"url": "https://127.0.0.1:8000"}, r"`url`: got 'https://127.0.0.1:8000'; allowed: host:port"),
        ({"root_certificates": __file__}, r"`root_certificates`: got .*; allowed: only with `ssl=True`"),
        ({"ssl": True, "root_certificates": "no.pem"}, r"`root_certificates`: got 'no.pem'; allowed: a PEM"),
        ({"ssl": True, "private_key": Path(__file__)}, r"`private_key`, `certificate_chain`"),
        ({"protocol": "https"}, r"`protocol`: got 'https'; allowed: grpc, http"),
    ],
)
def test_arguments_that_cannot_be_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Client(**arguments)
