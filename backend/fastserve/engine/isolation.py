"""One sequence that cannot be computed fails alone.

Until its tokens are marked as computed a step changes nothing but what it would write again: keys and values
of its own tokens. So one that raises is computed again by halves, and only the sequence that it cannot be
computed with fails.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from fastserve.engine.compute_errors import not_computed
from fastserve.engine.sampler import SampledToken
from fastserve.scheduling.sequence import ScheduledSequence

Compute = Callable[[list[ScheduledSequence]], list[SampledToken | None]]
logger = logging.getLogger(__name__)


def compute_isolated(
    items: list[ScheduledSequence], compute: Compute, probe: Callable[[], None]
) -> list[SampledToken | None]:
    """What `compute` gives for each of the items; an error for one with which that raises.

    Raises what `compute` raised if `probe` raises, too: the device computes nothing any more, so that
    no sequence is at fault.
    """
    try:
        return compute(items)
    except Exception as error:
        _require_device(probe, error)
        if len(items) > 1:
            halves = items[: len(items) // 2], items[len(items) // 2 :]
            return [token for half in halves for token in compute_isolated(half, compute, probe)]
        uid = items[0].sequence.request.uid
        logger.exception("request %s cannot be computed; it fails, and the others go on", uid)
        return [SampledToken(-1, [], not_computed(error))]


def _require_device(probe: Callable[[], None], error: Exception) -> None:
    try:
        probe()
    except Exception:
        raise error from None
