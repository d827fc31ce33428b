"""One thread of a model's process at a time sends a response or changes a metric."""

from __future__ import annotations

import threading

SERVER_LOCK = threading.RLock()
"""Held for a call into the server's library, which waits for the server's own process and nobody of ours.

Two threads that send, or change one metric, at the same moment were seen to end the server, or this process,
whose memory was overwritten (2.51).
"""
