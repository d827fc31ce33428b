"""The common queue for prompts without tokens, and a way to spread them that looks at nothing."""

from __future__ import annotations

from collections.abc import Mapping

from fastserve.scheduling.admission import AdmissionQueue, Waiting
from fastserve.scheduling.policies.policy import Policy
from fastserve.scheduling.replica import Demand


class SimulatedQueue(AdmissionQueue):
    """The server's queue, which finds prompts' blocks under the workload's names for them."""

    def __init__(self, policy: Policy, names: Mapping[str, list[bytes]]) -> None:
        """`names`: of the full blocks of prompts that may share some, by uid."""
        super().__init__(policy, max_queue_size=1 << 62, max_queue_seconds=0.0)
        self._names = names

    def hash_prompt(self, waiting: Waiting) -> None:
        """Looks the names up."""
        waiting.hashes = self._names.get(waiting.view.uid, [])


class RoundRobinQueue(SimulatedQueue):
    """Requests go to the replicas in turn, past those without room: what the server's rule is measured by."""

    def __init__(self, policy: Policy, names: Mapping[str, list[bytes]]) -> None:
        super().__init__(policy, names)
        self._last = -1

    def choose(self, waiting: Waiting, with_room: Mapping[int, Demand]) -> int:
        """The next one; a preempted sequence goes back where its blocks are, if it can."""
        if waiting.replica is not None and waiting.replica in with_room:
            return waiting.replica
        self._last = next((number for number in with_room if number > self._last), min(with_room))
        return self._last
