"""Skip-join multi-level feedback queue: short answers first, without knowing which ones are short."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from fastserve.scheduling.policies.policy import Policy, Rank
from fastserve.types import RequestView

EVICTED_LEVEL = -99.0
"""Before all levels, hinted ones too, until it runs again."""


@dataclass(frozen=True)
class MLFQ(Policy):
    """The policy of the FastServe paper (Wu et al., arXiv 2305.05920), within classes of equal priority.

    Service is counted in tokens: one of the answer is 1, one of the prompt `prompt_token_cost`. Level i
    grants `quantum * growth**i`. A request joins at the first level whose quantum covers its prompt, skipping
    those that it would only fall through. When its quantum is used up it goes down a level. The lowest level
    runs first, in order of arrival; a running request is preempted by one of a lower level, never by its
    like. State: (level, service had at that level), with a third element after an eviction.

    A request with a length hint ranks by what it is expected to need yet: at the level, fractions included,
    whose quantum is just that. One that outlives its hint goes on as if it had had none.

    One that is preempted because KV blocks lack comes back first, and starts again at level 0.

    The numbers are what `fastserve simulate` found best (`docs/scheduling.md`).

    Starvation: a request that has waited `starvation_seconds` since it last ran goes before all that have
    not, whatever their priority. It then has one turn that nobody takes from it, of the quantum with which it
    joined, and starts again at level 0. A turn's level is below 0: -1 - i with the quantum of level i.
    """

    preempts_at_a_loss: ClassVar[bool] = False

    quantum: float = 64.0
    growth: float = 3.0
    num_levels: int = 3
    prompt_token_cost: float = 0.12
    starvation_seconds: float = 600.0

    def rank(self, view: RequestView, now: float) -> Rank:
        """(1, -priority, level); of the starved (0, since when they wait), before them whoever has a turn."""
        if self._is_starved(view, now):
            return (0.0, view.waiting_since or 0.0, 0.0)
        level, _, *is_evicted = self._state(view)
        if level < 0.0:
            return (-1.0, 0.0, 0.0)
        if is_evicted:
            return (1.0, -view.priority, EVICTED_LEVEL)
        expected = self._expected_service(view)
        return (1.0, -view.priority, level if expected is None else self._level_of(expected))

    def spares(self, rank: Rank, last: Rank) -> bool:
        """Only a higher class, or one that has its turn: a level is not worth what a long request loses."""
        return rank[:2] < last[:2]

    def on_enqueue(self, view: RequestView, now: float) -> None:
        """A new request gets its level."""
        view.state = self._state(view)

    def on_admit(self, view: RequestView, now: float) -> None:
        """A starved request has its turn: at its own level it would be preempted at once."""
        if self._is_starved(view, now):
            view.state = (-1.0 - self._first_level(view), 0.0)

    def on_evict(self, view: RequestView, now: float) -> None:
        """Comes back before all newcomers of its class, for behind them it would lose its blocks for certain,
        and starts again at level 0."""
        view.state = (0.0, 0.0, 1.0)

    def on_service(
        self, view: RequestView, num_prompt_tokens: int, num_output_tokens: int, now: float
    ) -> bool:
        """Goes down a level when the quantum is used up."""
        level, service = self._state(view)[:2]
        service += num_prompt_tokens * self.prompt_token_cost + num_output_tokens
        if service < self._quantum(level) or level == self.num_levels - 1:
            view.state = (level, service)
            return view.has_length_hint
        view.state = (max(0.0, level + 1), 0.0)
        return True

    def tokens_at_once(self, view: RequestView) -> int | None:
        """Until it goes down a level, or outlives its hint."""
        expected = self._expected_service(view)
        until_hint = math.inf if expected is None else view.num_prompt_tokens + view.expected_output_tokens
        until_hint -= view.num_served_tokens
        level, service = self._state(view)[:2]
        until_level = math.inf if level == self.num_levels - 1 else self._quantum(level) - service
        least = min(until_hint, until_level)
        return None if least == math.inf else max(1, math.ceil(least))

    def next_change(self, view: RequestView, now: float) -> float | None:
        """When it will have starved."""
        if view.waiting_since is None or self._is_starved(view, now):
            return None
        return view.waiting_since + self.starvation_seconds

    def _is_starved(self, view: RequestView, now: float) -> bool:
        return view.waiting_since is not None and now >= view.waiting_since + self.starvation_seconds

    def _quantum(self, level: float) -> float:
        return self.quantum * self.growth ** max(level, -1.0 - level)

    def _state(self, view: RequestView) -> tuple[float, ...]:
        return view.state or (self._first_level(view), 0.0)

    def _first_level(self, view: RequestView) -> float:
        level = math.ceil(self._level_of(view.num_prompt_tokens * self.prompt_token_cost) - 1e-9)
        return float(min(max(0, level), self.num_levels - 1))

    def _expected_service(self, view: RequestView) -> float | None:
        """What a hint says is still to be served; None without a hint, and beyond it."""
        left = view.num_prompt_tokens + view.expected_output_tokens - view.num_served_tokens
        if not view.has_length_hint or left <= 0:
            return None
        num_output_tokens = min(left, view.expected_output_tokens)
        return num_output_tokens + (left - num_output_tokens) * self.prompt_token_cost

    def _level_of(self, service: float) -> float:
        """The level, fractions included, whose quantum is so much, as if there were levels without end."""
        return math.log(service / self.quantum, self.growth)
