"""What it took to let a preempted sequence go on."""

from __future__ import annotations

from enum import Enum

from fastserve.scheduling.sequence import Sequence


class PreemptionKind(str, Enum):
    """The label `kind` of `fastserve_preemptions_total`."""

    KEPT = "kept"
    """Nothing: its blocks were still in the cache."""
    SWAP = "swap"
    """Blocks came back from host memory, and nothing was computed again."""
    RECOMPUTE = "recompute"
    """Some of its tokens are computed again."""


def preemption_kind(sequence: Sequence, num_copied_blocks: int) -> PreemptionKind:
    """Of a preempted sequence that has just been given blocks, so many of them from host memory."""
    if sequence.num_computed_tokens < sequence.view.num_served_tokens:
        return PreemptionKind.RECOMPUTE
    return PreemptionKind.SWAP if num_copied_blocks else PreemptionKind.KEPT
