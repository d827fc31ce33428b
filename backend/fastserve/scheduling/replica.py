"""One engine replica as the common queue knows it: what it has said, and what is on its way to it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from fastserve.scheduling.capacity import ReplicaCapacity
from fastserve.scheduling.policies.policy import Policy, Rank
from fastserve.scheduling.prefix_index import PrefixIndex

LOST_AFTER_SECONDS = 10.0
"""A release that, as the engine says, has not reached it so long after has been lost."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request takes of a replica."""

    num_slots: int
    num_blocks: int
    num_tokens: int
    """To be computed before its first token."""
    num_cached_tokens: int = 0
    """Found in the replica's prefix cache."""
    num_reserved_blocks: int = 0
    """Kept for its next tokens once it runs."""


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A release on its way: the replica's numbers do not count it yet."""

    time: float
    demand: Demand
    num_preempted: int
    """Slots that it takes from running sequences."""


class Replica:
    """What has been released takes room until the replica's numbers account for it, however long that takes.

    It is given up only when the engine says, long after the release, that it has not come.
    """

    def __init__(self) -> None:
        self.capacity: ReplicaCapacity | None = None
        self.prefixes = PrefixIndex(0)
        self._max_slots = 0
        """The most slots that this incarnation has had free: all of them, as its first message tells."""
        self._in_flight: deque[_InFlight] = deque()

    @property
    def oldest_release(self) -> float | None:
        """When the oldest release on its way was made; None: none is."""
        return self._in_flight[0].time if self._in_flight else None

    @property
    def load(self) -> int:
        """Sequences that run there or are on their way."""
        running = self.capacity.num_running if self.capacity else 0
        return running + sum(each.demand.num_slots for each in self._in_flight)

    @property
    def free_slots(self) -> int:
        """Slots that nobody on the way will take; below zero when more wait there than leave."""
        taken = sum(each.demand.num_slots - each.num_preempted for each in self._in_flight)
        return (self.capacity.free_slots if self.capacity else 0) - taken

    def update(self, capacity: ReplicaCapacity) -> None:
        """Learns what the replica could take."""
        last = self.capacity
        if last is None or last.incarnation != capacity.incarnation:
            self._max_slots = 0
            self.prefixes = PrefixIndex(capacity.num_blocks)
        # A replica counts across its workers, so these differences hold across them too.
        num_accounted = capacity.received - last.received if last is not None else 0
        for _ in range(min(num_accounted, len(self._in_flight))):
            self._in_flight.popleft()
        self._max_slots = max(self._max_slots, capacity.free_slots)
        self.capacity = capacity

    def drop_lost(self, as_of: float) -> None:
        """Forgets what was released long before `as_of`, but for as much as had arrived by then."""
        num_arrived = self.capacity.arrived - self.capacity.received if self.capacity else 0
        num_old = sum(each.time + LOST_AFTER_SECONDS <= as_of for each in self._in_flight)
        for _ in range(num_old - num_arrived):
            self._in_flight.popleft()

    def release(self, now: float, demand: Demand, num_preempted: int) -> None:
        """Something is on its way to it."""
        self._in_flight.append(_InFlight(now, demand, num_preempted))

    def clip(self, demand: Demand) -> Demand:
        """A request with more sequences than the replica has slots takes all of them."""
        num_slots = min(demand.num_slots, max(1, self._max_slots))
        return replace(demand, num_slots=num_slots)

    @property
    def free_tokens(self) -> int:
        """What nobody has claimed of the next step's token budget; below zero when prompts wait for later
        steps."""
        claimed = sum(each.demand.num_tokens for each in self._in_flight)
        return (self.capacity.free_tokens if self.capacity else 0) - claimed

    @property
    def _claimed_blocks(self) -> int:
        demands = [each.demand for each in self._in_flight]
        return sum(each.num_blocks + each.num_reserved_blocks for each in demands)

    def has_room(self, demand: Demand) -> bool:
        """Whether slots, blocks and tokens are free that nobody on the way will take."""
        return self.has_place(demand) and (self.load == 0 or self.free_tokens > 0)

    def has_place(self, demand: Demand) -> bool:
        """Whether slots and blocks are free that nobody on the way will take.

        An empty replica has room for everything: what is too long for its cache was refused before.
        """
        capacity = self.capacity
        if capacity is None or self.free_slots < demand.num_slots:
            return False
        if self.load == 0:
            return True
        return capacity.free_blocks - self._claimed_blocks >= demand.num_blocks

    def victim(self, demand: Demand, rank: Rank, policy: Policy) -> tuple[Rank, int] | None:
        """The best rank that a request of `rank` would preempt here, and how many sequences make way for it.

        None if that is not allowed, or not known: those that others on the way preempt are theirs. Where more
        run than are known, and all of those make way, the replica may find blocks with the others.
        """
        capacity = self.capacity
        if capacity is None:
            return None
        ranks, blocks = capacity.running_ranks, capacity.running_blocks
        first = sum(each.num_preempted for each in self._in_flight)
        num_preempted = max(1, demand.num_slots - max(0, self.free_slots))
        taken = demand.num_blocks + self._claimed_blocks
        while sum(blocks[: first + num_preempted]) + capacity.free_blocks < taken:
            if first + num_preempted >= len(ranks):
                if len(ranks) == capacity.num_running:
                    return None
                break
            num_preempted += 1
        last = first + num_preempted - 1
        if last >= len(ranks):
            return None
        return (ranks[last], num_preempted) if policy.preempts(rank, ranks[last]) else None
