"""The last response to a request: as long as it is not sent, the client waits.

A response whose final flag was to travel with it and that could not be sent leaves a sender that takes no
more (2.51), so while shared memory is short the flag travels alone, after the response. An error, which is
small, always carries its flag: one that came before left the server waiting, at its exit, for a request.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from fastserve.ensemble.tensors import FINAL, error_response
from fastserve.errors import RequestError

logger = logging.getLogger(__name__)

SHARED_MEMORY = "/dev/shm"
SHORT_BYTES = 16 << 20
"""Free shared memory below which a response may be refused: its pool grows by 4 MiB, or by its own size."""


def send_final(sender: Any, response: Any = None) -> None:
    """Sends the last response, or only the end. Raises as the sender does where there is no memory for it."""
    if response is not None and _is_short():
        sender.send(response)
        response = None
    if response is None:
        sender.send(flags=FINAL)
    else:
        sender.send(response, flags=FINAL)


def send_error(sender: Any, error: RequestError) -> None:
    """Ends a request with an error, or at least ends it. Never raises: there is nobody else to tell."""
    try:
        sender.send(error_response(error), flags=FINAL)
        return
    except Exception as failure:
        logger.error("a request could not be told that it failed (%s): %s", error, failure)
    try:
        sender.send(flags=FINAL)
    except Exception as failure:
        logger.error("a request could not be ended: %s", failure)


def _is_short() -> bool:
    try:
        state = os.statvfs(SHARED_MEMORY)
    except OSError:
        return False
    return state.f_bavail * state.f_frsize < SHORT_BYTES
