"""What is checked before the server is started, so that it fails with a sentence and not in the middle."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from fastserve.start_error import StartError

SHARED_MEMORY = Path("/dev/shm")


OPENAI_PORT = 9000
"""Of OpenAI's API, unless another is given."""


@dataclass(frozen=True)
class Ports:
    """Where the server listens."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002
    openai: int = 0
    """Of OpenAI's API, which a process of its own offers; 0: it is not offered."""

    def flags(self) -> dict[str, int]:
        """The flag of each port that is used."""
        flags = {"--http-port": self.http, "--grpc-port": self.grpc, "--metrics-port": self.metrics}
        return flags | ({"--openai-port": self.openai} if self.openai else {})


def free_ports(address: str = "127.0.0.1") -> Ports:
    """Three ports that nobody listens on now."""
    sockets = [socket.create_server((address, 0), family=_family(address)) for _ in range(3)]
    try:
        return Ports(*(each.getsockname()[1] for each in sockets))
    finally:
        for each in sockets:
            each.close()


def resolve(host: str) -> str:
    """The address of a host, IPv4 or IPv6, in numbers. Raises StartError when it has none."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise StartError(f"no address for {host}: {error.strerror}; give another with --host") from error


def check_ports(address: str, ports: Ports, metrics_address: str | None = None) -> None:
    """Raises StartError when a port is taken or given twice; the sentence names its flag.

    `address` as `resolve` gives it; `metrics_address`: of the metrics port, if that has its own.
    """
    taken: dict[int, str] = {}
    for flag, port in ports.flags().items():
        if port in taken:
            raise StartError(f"{flag} and {taken[port]} are both {port}: give each its own port")
        taken[port] = flag
        at = metrics_address if metrics_address and flag == "--metrics-port" else address
        try:
            _bind_once(at, port)
        except OSError as error:
            raise StartError(
                f"cannot listen on {in_url(at)}:{port}: {error.strerror}; give another port with {flag}"
            ) from error


def in_url(address: str) -> str:
    """An address as it stands before the port."""
    return f"[{address}]" if ":" in address else address


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _bind_once(address: str, port: int) -> None:
    with socket.socket(_family(address)) as probe:
        # As the server does: a port whose last connection has just been closed is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((address, port))


def check_shared_memory(needed: int) -> None:
    """Raises StartError unless `needed` bytes of shared memory are free."""
    try:
        state = os.statvfs(SHARED_MEMORY)
    except OSError as error:
        raise StartError(f"{SHARED_MEMORY}: {error.strerror}; mount a tmpfs there") from error
    free = state.f_bavail * state.f_frsize
    if free < needed:
        raise StartError(
            f"{SHARED_MEMORY} has {free >> 20} MiB free, Triton server needs {needed >> 20} MiB there: "
            "in a container, start that with --shm-size=1g; else remove what fills it"
        )
