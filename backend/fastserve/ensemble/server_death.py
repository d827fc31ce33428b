"""Ends a stub whose server has died: 2.51's own attempt waits for ever where a response was on its way."""

from __future__ import annotations

import os
import threading
import time
from functools import cache

LOOK_SECONDS = 1.0
"""Between two looks; the server's own attempt has so long at least."""
GRACE_SECONDS = 5.0
"""For that attempt."""


@cache
def leave_with_server() -> None:
    """From now on this process ends when the one that started it does. The worker's pipe ends with it."""
    threading.Thread(target=_await_death, args=(os.getppid(),), name="server-death", daemon=True).start()


def _await_death(server: int) -> None:
    while os.getppid() == server:
        time.sleep(LOOK_SECONDS)
    time.sleep(GRACE_SECONDS)
    os._exit(1)
