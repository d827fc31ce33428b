"""What is guessed of one sequence, and how much of it was right."""

from __future__ import annotations

from fastserve.engine.ngram_proposer import NgramProposer
from fastserve.scheduling.sequence import Sequence

INITIAL_ACCEPTANCE, INITIAL_WEIGHT = 0.5, 2.0
"""Taken of a sequence of which nothing was proposed yet, and the guesses that this weighs as much as."""
MEMORY = 0.7
"""What earlier guesses keep of their weight with each step: text changes soon."""
MIN_REST, MAX_REST = 8, 256
"""Steps without a guess after trials that failed: twice as many each time."""


class Draft:
    """The guesses for one sequence: where they come from, and the acceptance that was measured of them."""

    def __init__(self, sequence: Sequence) -> None:
        self._proposer = NgramProposer(sequence.token_ids)
        self._num_right, self._num_tried = INITIAL_ACCEPTANCE * INITIAL_WEIGHT, INITIAL_WEIGHT
        """Of each step, the guesses up to the first that was wrong; the latest weigh most."""
        self._rest, self._next_rest = 0, MIN_REST

    @property
    def acceptance(self) -> float:
        """How probably a guess is right if those before it are."""
        return self._num_right / self._num_tried

    def propose(self, count: int) -> list[int]:
        """`count` tokens that may come next, or none; none while it rests."""
        if self._rest:
            self._rest -= 1
            return []
        return self._proposer.propose(count)

    def observe(self, num_proposed: int, num_accepted: int, is_trial: bool) -> None:
        """Learns what came of a step. `is_trial`: the guess was not worth its row, but for what it tells; a
        wrong one is followed by a rest then."""
        self._num_right = MEMORY * self._num_right + num_accepted
        self._num_tried = MEMORY * self._num_tried + min(num_proposed, num_accepted + 1)
        if not is_trial:
            self._next_rest = MIN_REST
        elif num_accepted == 0:
            self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, MAX_REST)
