"""What the C library keeps of memory that was freed."""

from __future__ import annotations

import ctypes


def trim() -> None:
    """Gives it back to the system, holes between what is still used too; glibc alone would keep hundreds of
    megabytes of them, for tensors come in all sizes. On another C library nothing happens."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
