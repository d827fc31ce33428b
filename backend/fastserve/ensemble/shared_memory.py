"""The shared memory through which a model's responses go: whether one may be refused for want of it.

A response that was to carry the final flag and could not be sent leaves a sender that takes no more (2.51):
its client would wait for ever. So while memory is short the flag travels alone, after the response.
"""

from __future__ import annotations

import os

SHARED_MEMORY = "/dev/shm"
SHORT_BYTES = 16 << 20
"""Free shared memory below which a response may be refused: its pool grows by 4 MiB, or by its own size."""


def is_shared_memory_short() -> bool:
    """Whether less than SHORT_BYTES are free."""
    try:
        state = os.statvfs(SHARED_MEMORY)
    except OSError:
        return False
    return state.f_bavail * state.f_frsize < SHORT_BYTES
