"""Where a server listens, and what every call to it carries."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Tls:
    """PEM files of a connection with TLS, by the names that `tritonclient.grpc` has for them."""

    root_certificates: Path | None = None
    """The authorities that may have signed the server's certificate; None: those that the library trusts."""
    private_key: Path | None = None
    certificate_chain: Path | None = None
    """The client's own certificate, for a server that asks for one; `private_key` belongs to it."""

    def context(self) -> ssl.SSLContext:
        """The form that Python's libraries take. Raises ssl.SSLError for a file that cannot be used."""
        context = ssl.create_default_context(cafile=self.root_certificates)
        if self.certificate_chain:
            context.load_cert_chain(self.certificate_chain, self.private_key)
        return context


@dataclass(frozen=True)
class Endpoint:
    """One port of a server."""

    address: str
    """`host:port`."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent with every call; over gRPC they are its metadata."""
    tls: Tls | None = None
    """None: the connection is not encrypted."""
    key: str | None = None
    """Shown with every request."""

    @property
    def authorization(self) -> str | None:
        """The key as a header has it. Over HTTP it goes in the body: Triton server 2.51 hands no header of
        `generate` to a model."""
        return self.key and f"Bearer {self.key}"


def endpoint_of(
    url: str,
    headers: Mapping[str, str] | None,
    key: str | None,
    ssl: bool,
    root_certificates: str | Path | None,
    private_key: str | Path | None,
    certificate_chain: str | Path | None,
) -> Endpoint:
    """The endpoint that a client's arguments name. Raises ValueError naming what does not fit."""
    if "/" in url:
        raise ValueError(f"`url`: got {url!r}; allowed: host:port, with `ssl=True` for a connection with TLS")
    files = {
        "root_certificates": root_certificates,
        "private_key": private_key,
        "certificate_chain": certificate_chain,
    }
    paths = {name: Path(file) for name, file in files.items() if file is not None}
    for name, path in paths.items():
        if not ssl:
            raise ValueError(f"`{name}`: got {str(path)!r}; allowed: only with `ssl=True`")
        if not path.is_file():
            raise ValueError(f"`{name}`: got {str(path)!r}; allowed: a PEM file")
    if (private_key is None) != (certificate_chain is None):
        raise ValueError("`private_key`, `certificate_chain`: got one; allowed: both or none")
    return Endpoint(url, headers or {}, Tls(**paths) if ssl else None, key)
