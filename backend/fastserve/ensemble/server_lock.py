"""One thread of a model's process at a time sends a response or changes a metric."""

from __future__ import annotations

import threading

SERVER_LOCK = threading.RLock()
"""Held for a call into the server's library, which waits for the server's own process and nobody of ours.

Triton server 2.51, and this process, were seen to end where several threads did so at once.
"""
