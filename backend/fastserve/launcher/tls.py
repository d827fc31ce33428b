"""TLS of the ports that clients call: checked before anything starts, and given to gRPC as flags."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from fastserve.start_error import StartError


@dataclass(frozen=True)
class TlsFiles:
    """PEM files."""

    certificate: Path
    """The server's, and those between it and its authority."""
    key: Path
    client_ca: Path | None = None
    """The authority of clients' certificates: who has none of them is not let in. None: nobody needs one."""

    def context(self) -> ssl.SSLContext:
        """For a server. Raises StartError for files that cannot be used, naming the flag."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise StartError(
                f"--tls-cert {self.certificate}, --tls-key {self.key}: {error.strerror or error}; allowed: "
                "PEM files of a certificate and of its key, without a password"
            ) from error
        if self.client_ca is not None:
            try:
                context.load_verify_locations(self.client_ca)
            except (OSError, ssl.SSLError) as error:
                raise StartError(
                    f"--tls-client-ca {self.client_ca}: {error.strerror or error}; allowed: a PEM file"
                ) from error
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def grpc_flags(self) -> list[str]:
        """The flags of `tritonserver`, which speaks TLS over gRPC itself."""
        flags = [
            "--grpc-use-ssl=true",
            f"--grpc-server-cert={self.certificate.absolute()}",
            f"--grpc-server-key={self.key.absolute()}",
        ]
        if self.client_ca is not None:
            flags += ["--grpc-use-ssl-mutual=true", f"--grpc-root-cert={self.client_ca.absolute()}"]
        return flags


def tls_files(certificate: Path | None, key: Path | None, client_ca: Path | None) -> TlsFiles | None:
    """What three flags ask for; None: no TLS. Raises StartError for one without the other."""
    if certificate is None and key is None:
        if client_ca is not None:
            raise StartError("--tls-client-ca: got it alone; allowed: with --tls-cert and --tls-key")
        return None
    if certificate is None or key is None:
        raise StartError("--tls-cert, --tls-key: got one; allowed: both or none")
    return TlsFiles(certificate, key, client_ca)
