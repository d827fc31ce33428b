"""The launcher's word to the step `preprocess` that the server is stopping and takes no more requests.

It is a file: the steps look for it, so nothing has to reach them through a server that is busy.
"""

from __future__ import annotations

import os

from fastserve.errors import ErrorCode, RequestError

STOPPING_VARIABLE = "FASTSERVE_STOPPING"
"""The file's path. Not set, or no such file: requests are taken."""


def refuse_if_stopping() -> None:
    """Raises RequestError, UNAVAILABLE, once the launcher has said so."""
    path = os.environ.get(STOPPING_VARIABLE)
    if path and os.path.exists(path):
        raise RequestError("the server is stopping and takes no more requests", ErrorCode.UNAVAILABLE)
