"""Where a request of a client meets the keys: the first thing that each model does that clients call."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastserve.access.grant import Gate, Grant, unauthenticated, without_credentials
from fastserve.access.keyring import Keyring
from fastserve.config import Config, TenantQuota
from fastserve.ensemble.messaging import own_parameters
from fastserve.scheduling.quotas import Quotas
from fastserve.types import Request


class Door:
    """Of one model. Without `--keys-file` it is open to all."""

    def __init__(self, config: Config, model: str) -> None:
        """`model`: as keys name it. Raises KeysFileError."""
        self._gate = Gate(Keyring(Path(config.keys_file)), model) if config.keys_file else None

    def read(self, triton_request: Any) -> tuple[Grant | None, dict[str, Any]]:
        """What the key of a request allows (None: everything, there are no keys), and its parameters.

        Raises RequestError for a request that may not come in.
        """
        # A list, not an object: one name may be there twice, from a header and from the body.
        pairs = json.loads(triton_request.parameters() or "{}", object_pairs_hook=list)
        parameters = own_parameters(dict(pairs))
        if self._gate is None:
            return None, parameters
        return self._gate.open(pairs), without_credentials(parameters)


class TenantQuotas:
    """The quotas of the settings, and over them those of the keys file, which may change."""

    def __init__(self, config: Config) -> None:
        """Raises KeysFileError."""
        self._settings: Mapping[str, TenantQuota] = config.tenant_quotas
        self._keyring = Keyring(Path(config.keys_file)) if config.keys_file else None
        self.quotas = Quotas(self._current())
        """What is admitted, and what is in flight."""

    def refresh(self) -> None:
        """Lets what the keys file says now hold, if it has changed."""
        if self._keyring is not None and self._keyring.refresh():
            self.quotas.replace(self._current())

    def check_key(self, request: Request) -> None:
        """Raises RequestError (UNAUTHENTICATED) for a request whose key has been revoked on its way here."""
        if self._keyring is not None and not self._keyring.holds(request.key_id):
            raise unauthenticated("a key that was revoked")

    def _current(self) -> dict[str, TenantQuota]:
        return {**self._settings, **(self._keyring.quotas if self._keyring else {})}
