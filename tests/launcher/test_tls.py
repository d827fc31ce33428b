"""TLS before Triton server: bytes come through both ways, whoever lacks a certificate does not come in, and
what one end closes is closed at the other."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from fastserve.launcher.tls import TlsFiles, tls_files
from fastserve.launcher.tls_relay import TlsRelay
from fastserve.start_error import StartError

SECONDS = 20.0


class Pki:
    """An authority, and PEM files of what it signed."""

    def __init__(self, path: Path) -> None:
        authority = trustme.CA()
        self.root, self.files = path / "root.pem", TlsFiles(path / "cert.pem", path / "key.pem")
        self.client = path / "client.pem"
        server, client = authority.issue_cert("127.0.0.1"), authority.issue_cert("client@example.com")
        authority.cert_pem.write_to_path(str(self.root))
        server.private_key_pem.write_to_path(str(self.files.key))
        self.files.certificate.write_bytes(b"".join(part.bytes() for part in server.cert_chain_pems))
        client.private_key_and_cert_chain_pem.write_to_path(str(self.client))

    def context(self, with_client: bool = False) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.root)
        if with_client:
            context.load_cert_chain(self.client)
        return context


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def target() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(SECONDS)
        yield listener


def relayed(pki: Pki, target: socket.socket, with_ca: bool) -> tuple[TlsRelay, tuple[str, int]]:
    files = TlsFiles(pki.files.certificate, pki.files.key, pki.root if with_ca else None)
    listener = socket.create_server(("127.0.0.1", 0))
    relay = TlsRelay(listener, files.context(), target.getsockname())
    relay.start()
    return relay, listener.getsockname()


def connect(address: tuple[str, int], context: ssl.SSLContext) -> ssl.SSLSocket:
    plain = socket.create_connection(address, timeout=SECONDS)
    return context.wrap_socket(plain, server_hostname="127.0.0.1")


@pytest.mark.parametrize("with_ca", [False, True])
def test_bytes_come_through_and_ends_too(pki: Pki, target: socket.socket, with_ca: bool) -> None:
    relay, address = relayed(pki, target, with_ca)
    try:
        for closes_first in ("client", "server"):
            client = connect(address, pki.context(with_ca))
            server = target.accept()[0]
            server.settimeout(SECONDS)
            big = bytes(range(256)) * 4000
            sending = threading.Thread(target=client.sendall, args=(big,))
            sending.start()
            assert read(server, len(big)) == big
            sending.join()
            server.sendall(b"answer")
            assert client.recv(100) == b"answer"
            first, second = (client, server) if closes_first == "client" else (server, client)
            first.close()
            assert second.recv(1) == b""
            second.close()
    finally:
        relay.close()
    with pytest.raises(OSError):  # noqa: PT011
        socket.create_connection(address, timeout=SECONDS).close()


def read(connection: socket.socket, length: int) -> bytes:
    """So many bytes, or those before the end."""
    data = bytearray()
    while len(data) < length and (piece := connection.recv(min(length - len(data), 1 << 16))):
        data += piece
    return bytes(data)


def send_and_read(address: tuple[str, int], context: ssl.SSLContext) -> None:
    """TLS 1.3 tells a client that it is refused when it reads."""
    with connect(address, context) as client:
        client.sendall(b"x")
        if not client.recv(1):
            raise ConnectionResetError


def test_who_lacks_a_certificate_is_not_let_in(pki: Pki, target: socket.socket) -> None:
    relay, address = relayed(pki, target, with_ca=True)
    target.settimeout(0.2)
    try:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            send_and_read(address, pki.context())
        with socket.create_connection(address, timeout=SECONDS) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert b"200" not in plain.recv(100)
        with pytest.raises(TimeoutError):
            target.accept()
    finally:
        relay.close()


def test_a_server_that_is_not_there_ends_the_connection(pki: Pki, target: socket.socket) -> None:
    relay, address = relayed(pki, target, with_ca=False)
    target.close()
    try:
        with connect(address, pki.context()) as client:
            assert client.recv(1) == b""
    finally:
        relay.close()


def usable(certificate: Path | None, key: Path | None, client_ca: Path | None) -> ssl.SSLContext | None:
    files = tls_files(certificate, key, client_ca)
    return None if files is None else files.context()


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (("cert", None, None), "--tls-cert, --tls-key: got one; allowed: both or none"),
        ((None, "key", None), "--tls-cert, --tls-key: got one; allowed: both or none"),
        ((None, None, "root"), "--tls-client-ca: got it alone"),
        (("cert", "cert", None), "--tls-cert .*allowed: PEM files"),
        (("missing", "key", None), "--tls-cert .*missing.pem"),
        (("cert", "key", "key"), "--tls-client-ca .*key.pem"),
    ],
)
def test_files_that_cannot_be_are_named(
    pki: Pki, names: tuple[str | None, str | None, str | None], sentence: str
) -> None:
    folder = pki.root.parent
    paths = [None if name is None else folder / f"{name}.pem" for name in names]
    with pytest.raises(StartError, match=sentence):
        usable(*paths)


def test_grpc_has_the_same_files(pki: Pki) -> None:
    files = TlsFiles(Path("c.pem"), Path("k.pem"), Path("ca.pem"))
    flags = files.grpc_flags()
    assert f"--grpc-root-cert={Path('ca.pem').absolute()}" in flags
    assert "--grpc-use-ssl-mutual=true" in flags
    assert len(pki.files.grpc_flags()) == 3
