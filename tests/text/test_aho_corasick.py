"""The automaton knows of a text what a search of its end finds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastserve.text.aho_corasick import automaton


@given(
    text=st.text("abc", max_size=30),
    patterns=st.lists(st.text("ab", min_size=1, max_size=5), max_size=5),
)
def test_a_state_is_the_longest_end_that_begins_a_pattern(text: str, patterns: list[str]) -> None:
    state = automaton(tuple(patterns))
    for position, character in enumerate(text, 1):
        state = state.step(character)
        shown = text[:position]
        begins = [pattern[:length] for pattern in patterns for length in range(1, len(pattern) + 1)]
        assert state.depth == max((len(each) for each in begins if shown.endswith(each)), default=0)
        assert state.matched == max((len(each) for each in patterns if shown.endswith(each)), default=0)
