"""The automaton of Aho and Corasick, "Efficient string matching", CACM 1975: O(1) per character, however many
patterns are looked for."""

from __future__ import annotations

from functools import lru_cache


class State:
    """The longest end of the text so far that begins a pattern."""

    __slots__ = ("depth", "fallback", "matched", "next")

    def __init__(self, depth: int) -> None:
        self.next: dict[str, State] = {}
        self.depth = depth
        """Its length."""
        self.matched = 0
        """The length of the longest pattern that ends here; 0: none does."""
        self.fallback: State | None = None
        """The state of its longest proper end that also begins a pattern; only the root has none."""

    def step(self, character: str) -> State:
        """The state after one more character."""
        state = self
        while character not in state.next:
            if state.fallback is None:
                return state
            state = state.fallback
        return state.next[character]


@lru_cache(maxsize=64)
def automaton(patterns: tuple[str, ...]) -> State:
    """The state before any text; no pattern is empty."""
    root = State(0)
    for pattern in patterns:
        state = root
        for character in pattern:
            state = state.next.setdefault(character, State(state.depth + 1))
        state.matched = len(pattern)
    level = [root]
    while level:
        for state in level:
            for character, child in state.next.items():
                child.fallback = root if state.fallback is None else state.fallback.step(character)
                child.matched = child.matched or child.fallback.matched
        level = [child for state in level for child in state.next.values()]
    return root
