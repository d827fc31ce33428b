"""Fairness over tenants by virtual token counters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping

from fastserve.scheduling.policies.policy import Policy, Rank
from fastserve.types import RequestView

PROMPT_TOKEN_COST = 1.0
OUTPUT_TOKEN_COST = 2.0
"""As in the paper: what a token adds to its tenant's counter."""
EVICTED = (1.0,)
"""The state of a request that waits because KV blocks ran out."""
MAX_IDLE_TENANTS = 1024
"""Clients name tenants freely: of more than these, those that were served least are forgotten."""


class Fair(Policy):
    """VTC (Sheng et al., arXiv 2401.00588), within classes of equal priority.

    A tenant's counter holds the tokens that it was served, weighted by their cost and divided by the
    tenant's weight. The request of the tenant with the lowest counter goes first, a tenant's own by arrival.
    The prompt is charged when the request is admitted, the answer as it is computed. A tenant who comes back
    is lifted to the lowest counter of those that wait, so that idleness saves up nothing. Nothing is
    preempted for a slot but by a higher class. One that lost its KV blocks goes on before the others of its
    class, as if it ran still: the bound has its tokens already, among those that the batch can hold.

    Bound, of two tenants of weight 1 that both have requests waiting all the time, in any interval, with L
    the longest prompt and M the tokens that the batch can hold: their service differs by at most
    2 * max(PROMPT_TOKEN_COST * L, OUTPUT_TOKEN_COST * M).

    Starvation: `starvation_seconds` after its arrival a request goes before all that have not starved,
    whatever their class. Among the starved the counters share out again: age does not help a tenant against
    another. It takes the next place that is free, nobody's: where all have starved, they would trade places.
    """

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        starvation_seconds: float = 600.0,
    ) -> None:
        """`weights`: by tenant, above 0; 1 where none is given."""
        self._weights = dict(weights or {})
        self._starvation_seconds = starvation_seconds
        self._counters: dict[str, float] = {}
        self._num_waiting: Counter[str] = Counter()
        self._last_tenant = ""
        """The one that was the last to wait: when nobody does, its counter is what others are lifted to."""

    def rank(self, view: RequestView, now: float) -> Rank:
        """(1, -class, 0 if evicted else 1, counter of its tenant); of the starved (0, 0, 0 or 1, counter)."""
        counter = self._counters.get(view.tenant, 0.0)
        if now >= view.arrival + self._starvation_seconds:
            return (0.0, 0.0, _turn(view), counter)
        return (1.0, -view.priority, _turn(view), counter)

    def preempts(self, rank: Rank, running: Rank) -> bool:
        """Only a higher class, none of the two having starved."""
        return rank[0] == running[0] and rank[1] < running[1]

    def group(self, view: RequestView) -> Hashable:
        """Its class and tenant."""
        return (view.priority, view.tenant)

    def order(self, view: RequestView, now: float) -> Rank:
        """(0 if evicted else 1, arrival)"""
        return (_turn(view), view.arrival)

    def on_enqueue(self, view: RequestView, now: float) -> None:
        """Lifts the counter of a tenant of whom nothing waited."""
        tenant = view.tenant
        self._num_waiting[tenant] += 1
        if self._num_waiting[tenant] == 1:
            others = [self._counters[each] for each in self._num_waiting if each != tenant]
            lowest = min(others, default=self._counters.get(self._last_tenant, 0.0))
            self._counters[tenant] = max(self._counters.get(tenant, 0.0), lowest)
            if len(self._counters) > MAX_IDLE_TENANTS + len(self._num_waiting):
                self._forget_idle()

    def on_admit(self, view: RequestView, now: float) -> None:
        """Charges the prompt, once."""
        self._leave(view)
        view.state = ()
        if view.num_served_tokens == 0:
            self._charge(view.tenant, PROMPT_TOKEN_COST * view.num_prompt_tokens)

    def on_abandon(self, view: RequestView) -> None:
        """One less waits."""
        self._leave(view)

    def on_evict(self, view: RequestView, now: float) -> None:
        """It goes on before others of its class: in its place they would use up the blocks that it left."""
        view.state = EVICTED

    def on_service(
        self, view: RequestView, num_prompt_tokens: int, num_output_tokens: int, now: float
    ) -> bool:
        """Charges the answer."""
        self._charge(view.tenant, OUTPUT_TOKEN_COST * num_output_tokens)
        return True

    def tokens_at_once(self, view: RequestView) -> int | None:
        """However many: nobody is preempted because of a counter."""
        return None

    def next_change(self, view: RequestView, now: float) -> float | None:
        """When it will have starved."""
        starving = view.arrival + self._starvation_seconds
        return starving if starving > now else None

    def on_tenant_service(self, tenant: str, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """Charges what the engines computed of the tenant's answers."""
        self._charge(tenant, OUTPUT_TOKEN_COST * num_output_tokens)

    def _forget_idle(self) -> None:
        """Drops the lowest counters of those who wait for nothing: they would be lifted, coming back."""
        kept = {*self._num_waiting, self._last_tenant}
        idle = sorted(self._counters.keys() - kept, key=lambda tenant: self._counters[tenant])
        for tenant in idle[: -MAX_IDLE_TENANTS // 2]:
            del self._counters[tenant]

    def _charge(self, tenant: str, cost: float) -> None:
        self._counters[tenant] = self._counters.get(tenant, 0.0) + cost / self._weights.get(tenant, 1.0)

    def _leave(self, view: RequestView) -> None:
        self._num_waiting[view.tenant] -= 1
        if not self._num_waiting[view.tenant]:
            del self._num_waiting[view.tenant]
            self._last_tenant = view.tenant


def _turn(view: RequestView) -> float:
    """0 for a request that goes on before others of its class, else 1."""
    return 0.0 if view.state == EVICTED else 1.0
