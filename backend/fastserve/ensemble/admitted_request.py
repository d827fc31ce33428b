"""A request of an encoder that was let in: what quotas and the request log go by."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field

from fastserve.access.grant import Grant
from fastserve.access.request_log import RequestRecord, code_of, refused, wall_clock


@dataclass(frozen=True)
class AdmittedRequest:
    """Without its texts, which no log gets."""

    request_id: str
    """The client's."""
    max_total_tokens: int
    """Of its texts."""
    tenant: str = ""
    key_id: str = ""
    uid: str = field(default_factory=lambda: uuid.uuid4().hex)
    arrival: float = field(default_factory=time.monotonic)
    deadline: float | None = None
    """None: it ends when its batch does."""


def admitted_request(request_id: str, num_tokens: int, grant: Grant | None) -> AdmittedRequest:
    """A request that has come now. `grant`: None where there are no keys."""
    if grant is None:
        return AdmittedRequest(request_id, num_tokens)
    return AdmittedRequest(request_id, num_tokens, grant.tenant, grant.key_id)


def encoder_record(
    model: str, outcome: str, admitted: AdmittedRequest | None, error: Exception | None
) -> RequestRecord:
    """The record of a request that ends now. `admitted`: None where it was not let in."""
    now = time.monotonic()
    if admitted is None:
        return refused(error, outcome, now, model=model)
    return RequestRecord(
        arrival=wall_clock(admitted.arrival, now),
        id=admitted.request_id,
        uid=admitted.uid,
        model=model,
        tenant=admitted.tenant,
        key=admitted.key_id,
        outcome=outcome,
        code=code_of(error),
        prompt_tokens=admitted.max_total_tokens,
        total_seconds=round(now - admitted.arrival, 6),
    )
