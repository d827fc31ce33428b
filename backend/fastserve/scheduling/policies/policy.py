"""What a policy is. The common queue, the iteration scheduler and the simulator ask nothing else of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, ClassVar

from fastserve.types import RequestView

Rank = tuple[float, ...]
"""Compared element by element: the lowest runs first. All ranks of one policy have the same length."""


class Policy:
    """Orders requests. A policy overrides `rank`, and of the rest what it needs.

    Each process has a policy object of its own: `scheduler` ranks what waits, a worker what runs.
    """

    preempts_at_a_loss: ClassVar[bool] = True
    """Whether it preempts a sequence even where its KV blocks cannot all be kept, in the cache or in host
    memory, so that some of it is computed again. A policy that preempts often does better not to."""

    def overrides(self, method: Callable[..., Any]) -> bool:
        """Whether the policy has a method of its own in place of this class's: where not, nobody calls it."""
        return getattr(type(self), method.__name__) is not method

    def rank(self, view: RequestView, now: float) -> Rank:
        """The rank of a request that waits or runs. Ties go to the earlier arrival.

        Between two calls of `on_service` that return True, and two times that `next_change` gives, it may
        change only in ways that keep the order within a `group`.
        """
        raise NotImplementedError

    def preempts(self, rank: Rank, running: Rank) -> bool:
        """Whether a request of `rank` may take the slot of a running one, which then waits again.

        By default whenever it ranks before it. A policy whose ranks change with time says less, or two
        requests would trade places for ever.
        """
        return rank < running

    def spares(self, rank: Rank, last: Rank) -> bool:
        """Whether, where KV blocks lack, the last of the batch makes way and not a running request of `rank`
        even if less of that one would have to be computed again.

        By default if the one of `rank` could preempt the last.
        """
        return self.preempts(rank, last)

    def on_enqueue(self, view: RequestView, now: float) -> None:
        """The request joins the queue: it has come, or was preempted."""

    def on_admit(self, view: RequestView, now: float) -> None:
        """The request leaves the queue to run. `view.waiting_since` still says since when it has waited."""

    def on_abandon(self, view: RequestView) -> None:
        """The request leaves the queue and will not run: it was cancelled, or its time is over."""

    def on_evict(self, view: RequestView, now: float) -> None:
        """A running request is preempted because KV blocks ran out, not for the sake of another.

        What was computed of it is lost unless it runs again soon. It joins the queue then.
        """

    def on_service(
        self, view: RequestView, num_prompt_tokens: int, num_output_tokens: int, now: float
    ) -> bool:
        """A step has computed so many tokens of a running request, none of them for a second time.

        Returns whether its rank has changed.
        """
        return False

    def tokens_at_once(self, view: RequestView) -> int | None:
        """How many tokens more of its answer a running request gets before its rank may become worse.

        None: however many. One `on_service` of so many must do what as many of one token do. The simulator
        jumps over that many steps at once.
        """
        return None if type(self).on_service is Policy.on_service else 1

    def on_tenant_service(self, tenant: str, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """The common queue learns what the engines have computed for a tenant since it was last told."""

    def next_change(self, view: RequestView, now: float) -> float | None:
        """When time alone changes the place of a waiting request within its group; None: never."""
        return None

    def group(self, view: RequestView) -> Hashable:
        """Requests of one group keep their order whatever the time, so only the first of each is ranked.

        Fewer groups are cheaper: the queue ranks one request of each whenever it is asked for the first.
        """
        return None

    def order(self, view: RequestView, now: float) -> Rank:
        """The order within a group: the lowest first. `rank` by default, which must then not depend on the
        moment at which it is asked for."""
        return self.rank(view, now)
