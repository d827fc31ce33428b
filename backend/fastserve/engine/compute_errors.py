"""The errors of a request that the model cannot compute.

Their code is INTERNAL, with which the client does not send the request again: it would only fail again.
"""

from __future__ import annotations

from fastserve.errors import ErrorCode, RequestError

MAX_CAUSE = 300
"""Characters of an exception's text that a client is shown."""


def not_computed(error: Exception) -> RequestError:
    """For a sequence with which the model, or the booking of its token, raises."""
    cause = f"{type(error).__name__}: {error}"[:MAX_CAUSE]
    return RequestError(f"the model cannot compute this request: {cause}", ErrorCode.INTERNAL)


def not_finite(position: int) -> RequestError:
    """For a sequence for which the model gives NaN or infinity after the token at `position`."""
    return RequestError(
        f"the model's numbers are not finite (NaN or infinity) after token {position} of the sequence, as "
        "when float16 overflows: serve the model with another `dtype`",
        ErrorCode.INTERNAL,
    )
