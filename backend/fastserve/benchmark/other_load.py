"""How busy the machine is with what is not measured."""

from __future__ import annotations

import time

import psutil

BUSY = 0.05
"""Of a core, from which on figures are of no worth."""


def other_load(seconds: float) -> float:
    """Cores in use for so many seconds from now, while nothing is sent to any target.

    By other programs, by a hypervisor's other guests (steal), and by targets that do not rest.
    """
    before = psutil.cpu_times()
    time.sleep(seconds)
    after = psutil.cpu_times()
    idle = (after.idle - before.idle) + (getattr(after, "iowait", 0.0) - getattr(before, "iowait", 0.0))
    busy = sum(after) - sum(before) - idle
    guests = (getattr(after, "guest", 0.0) - getattr(before, "guest", 0.0)) + (
        getattr(after, "guest_nice", 0.0) - getattr(before, "guest_nice", 0.0)
    )  # which is counted in user and nice already
    return max(0.0, busy - guests) / seconds
