"""What a client is allowed, by the key that it shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from msgspec import Struct

from fastserve.access.key import Key
from fastserve.access.keyring import Keyring
from fastserve.errors import ErrorCode, RequestError
from fastserve.types import Request

HEADER = "authorization"
"""Metadata over gRPC and a header of HTTP `infer`, which Triton server hands to models as request parameters;
in the body of HTTP `generate`, of which it hands on no header (2.51), such a parameter itself."""
SCHEME = "Bearer "
LLM = "fastserve"
"""The model that a key names for `fastserve` and `fastserve_infer`."""


class Grant(Struct, frozen=True):
    """What one key allows."""

    key_id: str
    tenant: str
    priority_range: tuple[int, int] | None
    cache_salt: str

    def apply(self, request: Request) -> Request:
        """The request as its tenant's. Raises RequestError (PERMISSION_DENIED) for what the key forbids.

        Priority 0, which is also that of a request that names none, becomes the nearest of the key's range.
        """
        if request.tenant not in ("", self.tenant):
            raise denied("tenant", request.tenant, f"none, or {self.tenant!r}, to whom the key belongs")
        return msgspec.structs.replace(
            request,
            tenant=self.tenant,
            priority=self.allowed_priority(request.priority),
            cache_salt=self.cache_salt,
            key_id=self.key_id,
        )

    def allowed_priority(self, priority: int) -> int:
        """The priority, or for 0 the nearest of the range. Raises RequestError (PERMISSION_DENIED)."""
        if self.priority_range is None:
            return priority
        low, high = self.priority_range
        if priority == 0:
            return min(max(priority, low), high)
        if not low <= priority <= high:
            raise denied("priority", priority, f"{low} to {high}, the range of the key")
        return priority


class Gate:
    """Lets those in who show a key for one model."""

    def __init__(self, keyring: Keyring, model: str) -> None:
        self._keyring = keyring
        self._model = model

    def open(self, parameters: Iterable[tuple[str, Any]]) -> Grant:
        """What the key among a request's parameters allows.

        Raises RequestError: UNAUTHENTICATED without a key that holds, PERMISSION_DENIED where it is not for
        this model, UNAVAILABLE while the keys cannot be read.
        """
        key = self._keyring.find(shown_key(parameters))
        if key is None:
            raise unauthenticated("a key that is not known, or was revoked")
        self._check_model(key)
        tenant = self._keyring.tenant(key.tenant)
        return Grant(key.id, key.tenant, key.priority_range, tenant.cache_salt)

    def _check_model(self, key: Key) -> None:
        if key.models is not None and self._model not in key.models:
            raise denied("model", self._model, f"{', '.join(key.models) or 'none'}, the models of the key")


def shown_key(parameters: Iterable[tuple[str, Any]]) -> str:
    """The key in the parameters that Triton server makes of headers. Raises RequestError (UNAUTHENTICATED).

    A parameter in a request's body looks as one made of a header does: so one alone is allowed, whichever
    it is, and a body can neither hide nor replace what a proxy has written into the header.
    """
    values = [value for name, value in parameters if name.lower() == HEADER]
    if not values:
        raise unauthenticated("no key")
    if len(values) > 1:
        raise unauthenticated("more than one key")
    value = values[0]
    if not isinstance(value, str) or not value[: len(SCHEME)].lower() == SCHEME.lower():
        raise unauthenticated("something other than `Bearer KEY`")
    return value[len(SCHEME) :].strip()


def without_credentials(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters less those that carry keys."""
    return {name: value for name, value in parameters.items() if name.lower() != HEADER}


def unauthenticated(came: str) -> RequestError:
    """The error for a client that shows no key that holds. It never quotes what came."""
    return RequestError(
        f"`{HEADER}`: got {came}; allowed: `Bearer KEY` with a key of this server, as gRPC metadata or HTTP "
        "header of `infer`, or as a request parameter",
        ErrorCode.UNAUTHENTICATED,
    )


def denied(field: str, came: object, allowed: str) -> RequestError:
    """The error for what the key does not allow."""
    return RequestError(f"`{field}`: got {came!r}; allowed: {allowed}", ErrorCode.PERMISSION_DENIED)
