"""Flags of `tritonserver` for a server with keys: headers reach the models, and all else than inference and
health is closed, to everybody.

Triton server opens a restricted API to who sends a header of a given name and value. Both stand in its
command line, which whoever is on the machine may read; so they are such that no client can send them: a
header's name has no space, and its value no line break. The launcher does without these APIs too.
"""

from __future__ import annotations

import secrets

from fastserve.access.grant import HEADER

OPEN_APIS = ("health", "inference")
CLOSED_APIS = (
    "metadata",
    "shared-memory",
    "model-config",
    "model-repository",
    "statistics",
    "trace",
    "logging",
)
"""Of both protocols: all others of 2.51."""
SET_WITH_KEYS = {
    "http-header-forward-pattern": "the keys come by it",
    "grpc-header-forward-pattern": "the keys come by it",
    "http-restricted-api": "all APIs but health and inference are closed",
    "grpc-restricted-protocol": "all APIs but health and inference are closed",
    "allow-sagemaker": "keys do not reach the models by it",
    "allow-vertex-ai": "keys do not reach the models by it",
}
"""Flags of `tritonserver` that are refused beside `--keys-file`, and why."""


def key_flags() -> list[str]:
    """The flags of a server whose models ask for keys."""
    name, value = "Closed Api", f"\r\nclosed {secrets.token_hex(16)}"
    closed = f"{','.join(CLOSED_APIS)}:{name}={value}"
    return [
        f"--http-header-forward-pattern=(?i)^{HEADER}$",
        f"--grpc-header-forward-pattern=(?i)^{HEADER}$",
        f"--http-restricted-api={closed}",
        f"--grpc-restricted-protocol={closed}",
    ]
