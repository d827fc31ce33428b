"""The one error of everything that happens before the server is ready."""

from __future__ import annotations


class StartError(Exception):
    """What keeps the server from starting, in one sentence that ends with the remedy."""
