"""A scheduling policy of one's own, in one file: earliest deadline first.

    make serve ARGS="--policy examples/custom_policy.py:earliest_deadline_first"

Each step of priority halves the time in which a request wants its first token. The request whose time runs
out soonest goes first, in the common queue and in the batch, where it also preempts. As with every policy
whose rank is linear in the arrival, nobody starves: a request is overtaken only by those that came before its
own deadline.

Run by itself, the file prints how a few requests would be ordered:

    python examples/custom_policy.py
"""

from __future__ import annotations

from dataclasses import dataclass

from fastserve.config import Config
from fastserve.scheduling.policies.policy import Policy, Rank
from fastserve.scheduling.policies.registry import make_policy
from fastserve.types import RequestView

LEAST_URGENT = -10
"""Lower priorities count as this one, a thousand times the seconds of priority 0."""


@dataclass(frozen=True)
class EarliestDeadlineFirst(Policy):
    """Orders requests by when they want their first token."""

    seconds: float
    """From arrival to that moment, at priority 0."""

    def rank(self, view: RequestView, now: float) -> Rank:
        """(deadline,): the lowest rank runs first."""
        return (view.arrival + self.seconds * 2.0 ** -max(view.priority, LEAST_URGENT),)


def earliest_deadline_first(config: Config) -> EarliestDeadlineFirst:
    """What `--policy` names: makes the policy from the settings. Here `--alpha` is the time at priority 0."""
    return EarliestDeadlineFirst(config.alpha)


REQUESTS = {
    "batch job": (-2, 0.0),
    "form": (0, 1.0),
    "second form": (0, 2.0),
    "chat": (3, 9.0),
    "late chat": (3, 45.0),
}
"""Priority and arrival, in seconds, of a few requests that wait."""


def order(policy: Policy) -> list[str]:
    """The names of `REQUESTS` in the order in which they run."""
    return sorted(REQUESTS, key=lambda name: policy.rank(view(*REQUESTS[name]), now=0.0))


def view(priority: int, arrival: float) -> RequestView:
    """What a policy sees of a request of 100 tokens that waits."""
    return RequestView("", 0, priority, arrival, "", 100, 100, waiting_since=arrival, num_tokens=100)


def main() -> None:
    """Prints the order under each policy."""
    for name in ("fcfs", "priority_age", f"{__file__}:earliest_deadline_first"):
        print(f"{name.split(':')[-1]}: {', '.join(order(make_policy(Config(policy=name))))}")


if __name__ == "__main__":
    main()
