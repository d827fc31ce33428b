"""Authentication codes of messages: only this server's own processes can compute them (`shared_secret`)."""

from __future__ import annotations

import hashlib
import hmac

from fastserve.ensemble.shared_secret import server_secret
from fastserve.errors import RequestError

MAC_BYTES = 16


def sign(name: str, data: bytes) -> bytes:
    """`data` behind its authentication code, valid for an input of that name (16 characters at most).

    Keyed BLAKE2b over all of it: 0.5 us for a token, 7 us for a prompt of 1,000. A bare secret in
    front would not do: whoever calls `preprocess` directly is given what that model sends to the next.
    """
    return authentication_code(name, data) + data


def verify(name: str, signed: bytes) -> memoryview:
    """The data that was signed for an input of that name. Raises RequestError for any other."""
    data = memoryview(signed)[MAC_BYTES:]
    if not hmac.compare_digest(signed[:MAC_BYTES], authentication_code(name, data)):
        raise RequestError(
            f"`{name}`: got a message that is not of this server's own models; allowed: none from a client,"
            " whose models are `fastserve` and `fastserve_infer`"
        )
    return data


def authentication_code(name: str, data: bytes | memoryview) -> bytes:
    """The code of `data` for the purpose `name`, in MAC_BYTES bytes."""
    return hashlib.blake2b(data, digest_size=MAC_BYTES, key=server_secret(), person=name.encode()).digest()
