"""How torch's threads behave in a process that shares its cores with others."""

from __future__ import annotations

import os

OPENMP_SPINS = 1000
"""How often a thread of torch's OpenMP looks for work before it sleeps, 300 times less than by default: it
would keep from running, beside another program, the very thread that it waits for."""


def limit_spinning() -> None:
    """To be called before torch is imported, and OpenMP with it."""
    os.environ.setdefault("GOMP_SPINCOUNT", str(OPENMP_SPINS))
