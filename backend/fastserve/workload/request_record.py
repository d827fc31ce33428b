"""What became of one request of a workload."""

from __future__ import annotations

from msgspec import Struct


class RequestRecord(Struct, frozen=True):
    """One request as its client saw it. Its latencies count from the moment it was due: what a late sender
    adds is in them, not hidden."""

    arrival: float
    """Seconds from the start at which it was due."""
    lateness: float
    """Seconds after that at which it was sent."""
    first_token: float | None
    """Seconds to the first token (TTFT); None if none came."""
    completion: float
    """Seconds to the end, or to the error."""
    num_prompt_tokens: int
    num_output_tokens: int
    """Those that came."""
    priority: int
    tenant: str
    error: str | None
    """The code with which it was refused or failed."""
