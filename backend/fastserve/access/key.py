"""A key: what a client shows, and what is kept of it.

A key is `fsk_ID_SECRET`. The id finds its record and may be shown; the secret is 256 random bits, so one
round of SHA-256 keeps it: a slow hash protects words that people choose, and would cost each request time.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from datetime import datetime, timezone
from typing import Annotated

from msgspec import Meta, Struct

PREFIX = "fsk"
"""By which a key is known in a text: `masking` looks for it too."""
KEY_VARIABLE = "FASTSERVE_KEY"
"""The environment variable of the key that a command shows: a flag could be read by who is on the machine."""
ID_BYTES = 6
SECRET_BYTES = 32
_KEY = re.compile(rf"{PREFIX}_([0-9a-f]{{{2 * ID_BYTES}}})_([A-Za-z0-9_-]{{43}})", re.ASCII)

PriorityRange = tuple[Annotated[int, Meta(ge=-(2**31))], Annotated[int, Meta(le=2**31 - 1)]]
"""LOW and HIGH, both allowed."""


class Key(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the keys file holds of one key; nobody can make the key from it."""

    id: str
    sha256: str
    """Of the whole key, in hexadecimal."""
    tenant: Annotated[str, Meta(min_length=1, max_length=128)]
    priority_range: PriorityRange | None = None
    """None: that of the server (`--priority-range`)."""
    models: tuple[str, ...] | None = None
    """None: all. `fastserve` stands for `fastserve_infer` too."""
    created: str
    """UTC, ISO 8601."""
    revoked: str | None = None
    """When; None: it holds."""

    def __post_init__(self) -> None:
        if self.priority_range is not None and self.priority_range[0] > self.priority_range[1]:
            raise ValueError(
                f"`priority_range`: got {self.priority_range}; allowed: LOW,HIGH with LOW at most HIGH"
            )

    def matches(self, shown: str) -> bool:
        """Whether `shown` is this key; it takes the same time however much of it is right."""
        return hmac.compare_digest(self.sha256, digest(shown))


def new_key(
    tenant: str, priority_range: PriorityRange | None = None, models: tuple[str, ...] | None = None
) -> tuple[str, Key]:
    """A new key and its record. Nobody sees the key again."""
    key_id = secrets.token_hex(ID_BYTES)
    shown = f"{PREFIX}_{key_id}_{secrets.token_urlsafe(SECRET_BYTES)}"
    return shown, Key(
        id=key_id,
        sha256=digest(shown),
        tenant=tenant,
        priority_range=priority_range,
        models=models,
        created=utc_now(),
    )


def id_of(shown: str) -> str | None:
    """The id in what a client shows; None where that is no key."""
    found = _KEY.fullmatch(shown)
    return found and found[1]


def digest(shown: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(shown.encode(errors="surrogatepass")).hexdigest()


def utc_now() -> str:
    """The time, as the file has it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
