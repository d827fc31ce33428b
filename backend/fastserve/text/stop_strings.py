"""Stop strings in a text that comes in pieces."""

from __future__ import annotations

from functools import lru_cache


class _State:
    """A node of the automaton: the longest end of the text so far that begins a stop string."""

    __slots__ = ("depth", "fallback", "matched", "next")

    def __init__(self, depth: int, matched: int = 0) -> None:
        self.next: dict[str, _State] = {}
        self.depth = depth
        """Its length."""
        self.matched = matched
        """The length of the longest stop string that ends here; 0: none does."""
        self.fallback: _State | None = None
        """The state of its longest proper end that also begins a stop string."""


@lru_cache(maxsize=64)
def _automaton(stops: tuple[str, ...]) -> _State:
    """Aho and Corasick, "Efficient string matching", CACM 1975: O(1) per character, however many stops."""
    root = _State(0)
    for stop in stops:
        state = root
        for character in stop:
            state = state.next.setdefault(character, _State(state.depth + 1))
        state.matched = len(stop)
    level = [root]
    while level:
        for state in level:
            for character, child in state.next.items():
                child.fallback = root if state is root else _step(state.fallback, root, character)
                child.matched = child.matched or child.fallback.matched
        level = [child for state in level for child in state.next.values()]
    return root


def _step(state: _State | None, root: _State, character: str) -> _State:
    while state is not None:
        if character in state.next:
            return state.next[character]
        state = state.fallback
    return root


class StopStrings:
    """Finds the first stop string of one sequence's text and lets out only what cannot belong to one.

    The first is the one that is complete first as the text grows by characters; where several end at the same
    character, the longest. So the result does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: list[str], include_in_output: bool) -> None:
        """`stops`: none of them empty. `include_in_output`: let out the stop string itself too."""
        self._root = _automaton(tuple(stops))
        self._state = self._root
        self._include_in_output = include_in_output
        self._held = ""
        self._stopped = False

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, bool]:
        """The text that may be shown now, and whether a stop string has been met.

        `may_stop` false: a stop string that ends in this text is let through. After a stop, everything is
        dropped.
        """
        if self._stopped:
            return "", True
        for position, character in enumerate(text):
            self._state = _step(self._state, self._root, character)
            if self._state.matched and may_stop:
                self._stopped = True
                shown = self._held + text[: position + 1]
                return (shown if self._include_in_output else shown[: -self._state.matched]), True
        text = self._held + text
        shown_length = len(text) - self._state.depth
        self._held = text[shown_length:]
        return text[:shown_length], False

    def flush(self) -> str:
        """The text held back: no more will come, so it is no stop string."""
        return "" if self._stopped else self._held
