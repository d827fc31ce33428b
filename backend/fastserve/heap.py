"""The C library's heap: memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes


def trim() -> None:
    """Gives freed memory back to the system, holes between blocks in use included: glibc alone would keep
    hundreds of megabytes, for tensors come in all sizes. Does nothing on another C library."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
