"""Bad words are found from the last tokens as from the whole text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastserve.engine.bad_words import BadWords
from fastserve.scheduling.sequence import Sequence

tokens = st.integers(0, 6)


@given(
    words=st.lists(st.lists(tokens, min_size=1, max_size=4), max_size=8),
    prompt=st.lists(tokens, min_size=1),
    generated=st.lists(tokens),
)
def test_bad_words_are_found_wherever_they_would_end(
    words: list[list[int]], prompt: list[int], generated: list[int]
) -> None:
    expected = [
        word[-1]
        for word in words
        if len(word) - 1 <= len(generated) and word[:-1] == generated[len(generated) - len(word) + 1 :]
    ]
    sequence = a_sequence(prompt, generated)
    assert sorted(BadWords(words).banned(sequence)) == sorted(expected)


def a_sequence(prompt: list[int], generated: list[int]) -> Sequence:
    class Request:
        """A request as far as `Sequence` looks at it."""

        prompt_token_ids = prompt
        cache_salt = ""

    return Sequence(Request(), 0, 0.0, [*prompt, *generated])  # type: ignore[arg-type]
